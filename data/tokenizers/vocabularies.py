"""Vocabularies: SentencePiece, Hugging Face tokenizers, bytes, or a fixed set of characters.

A SentencePiece vocabulary is read from a file, or trained from a corpus and stored on disk.

A trained vocabulary is lossless: `decode(encode(x)) == x`. Text is not normalised (the corpus is
already NFC, and code must not change), white space is preserved, and unknown characters become
bytes. The one exception is U+2581, which SentencePiece uses for a space; it is decoded as U+2582.
Runs of spaces up to `MAX_SPACES`, of newlines and of tabs are pieces, so that an indentation is one
token. Every digit is a token, and all printable ASCII characters are pieces.

Ids: 0 pad, 1 EOS, 2 unknown, 3 BOS (if a task adds it).
"""

import base64
import hashlib
import importlib.metadata
import io
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from espalier.common import checkpoint_files, files
from espalier.common.bars import Bar
from espalier.common.ranges import Amount, Count, Fraction, Size, check_choice
from espalier.common.stages import stage
from espalier.common.storage import mirror
from espalier.data.cache import cache_dir as cache
from espalier.data.cache import fingerprint
from espalier.data.limited_process import LimitedProcess, LimitError
from espalier.data.text.documents import Document
from espalier.data.tokenizers import character_vocabulary, hf_vocabulary, vocabulary

MAX_SPACES = 16
SENTENCEPIECE = "tokenizer.model"  # of a checkpoint
SUFFIXES = (".json", ".model", ".jinja", ".txt")  # of the files that a tokenizer may have
_probe = LimitedProcess(
    "espalier.data.tokenizers.tokenizer_probe:check_sentencepiece", memory_bytes=2 << 30
)
_SPACE = "\u2581"
WHITE_SPACE_PIECES = (
    *("\n", "\n\n", "\t", "\t\t", "\t\t\t"),
    *(_SPACE * count for count in range(2, MAX_SPACES + 1)),
)
_REQUIRED = "".join(map(chr, range(0x21, 0x7F)))
_NORMALIZATION = "2581\t2582\n"  # hexadecimal code points, the format of SentencePiece's rule files
_MAX_LINE = 4000  # characters; longer lines are cut, because the trainer would skip them


class Texts(Protocol):
    """Texts to train a vocabulary from, such as a `Corpus` or `DocumentFiles`."""

    @property
    def digest(self) -> str: ...

    @property
    def sources(self) -> tuple[str, ...]: ...

    def size(self, source: str) -> int | None:
        """Returns the bytes of training text of a source; None if unknown."""

    def sample(self, source: str, num_bytes: float) -> Iterator[Document]:
        """Yields the same training documents each time, about `num_bytes` of the whole source."""


def sentencepiece(
    *,
    corpus: Texts,
    size: Size = 8192,
    algorithm: str = "bpe",
    sample_bytes: Amount = 10_000_000,
    balance: Fraction = 0.7,
    character_coverage: Fraction = 0.9995,
    special_tokens: Sequence[str] = (),
    extra_ids: Count = 0,
    cache_dir: str | os.PathLike | None = None,
):
    """Returns a SentencePiece vocabulary of a corpus; trains it once, then reads it from the cache.

    `vocabulary.json` beside the `.model` file records the corpus and the settings.

    Args:
      corpus: the texts; only training documents are read.
      size: number of pieces, including special pieces and 256 bytes.
      algorithm: `bpe` or `unigram`. Both are lossless; BPE trains ten times faster.
      sample_bytes: bytes of text to train on.
      balance: a source of b bytes gets a share of the sample proportional to b ** balance.
      character_coverage: share of all characters that get their own pieces; the others become
        bytes.
      special_tokens: texts that are one piece each, such as the tokens of a chat template. A text that spells them
        has these pieces too.
      extra_ids: number of sentinels after the last piece, as for T5 span corruption.
      cache_dir: root of the caches; default $ESPALIER_CACHE or ~/.cache/espalier.

    Returns:
      A `data.tokenizers.vocabulary.SentencePieceVocabulary`.

    Raises:
      ValueError: the sample does not allow this size, or the algorithm is unknown.
    """
    check_choice("vocabulary algorithm", algorithm, ("bpe", "unigram"))
    settings = {
        "corpus": corpus.digest,
        "size": size,
        "algorithm": algorithm,
        "sample_bytes": sample_bytes,
        "balance": balance,
        "character_coverage": character_coverage,
        "white_space_pieces": WHITE_SPACE_PIECES,
        "normalization": _NORMALIZATION,
        "required": _REQUIRED,
        "sentencepiece": importlib.metadata.version("sentencepiece"),
    }
    if special_tokens:  # absent by default, so that older vocabularies in the cache remain valid
        settings["special_tokens"] = list(special_tokens)
    key = fingerprint.of_json(settings)[:16]
    directory = cache.cache_dir("vocabularies", key, override=cache_dir)
    path = directory / "sentencepiece.model"

    def build(target: pathlib.Path) -> None:
        started = time.monotonic()
        with stage(f"training a vocabulary of {size} pieces"):
            model = _train(corpus, settings, target / "normalization.tsv")
        (target / path.name).write_bytes(model)
        digest = hashlib.sha256(model).hexdigest()
        record = {**settings, "sha256": digest}
        # Not synced here: build_directory does it.
        files.write_json(target / "vocabulary.json", record, synced=False)
        seconds = time.monotonic() - started
        print(f"vocabulary of {size} pieces in {seconds:.1f} s: {path}", file=sys.stderr)

    if not path.is_file():
        cache.build_directory(directory, build, expected=[path.name])
    return from_file(path=path, extra_ids=extra_ids)


def from_file(*, path: str | os.PathLike, extra_ids: Count = 0):
    """Returns the SentencePiece vocabulary in a `.model` file.

    `extra_ids` is the number of sentinels after the last piece, as for T5 span corruption.
    """
    path = mirror.local(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no SentencePiece model {os.fspath(path)!r}; give the path of a .model file, or train one "
            "with espalier prepare vocabulary"
        )
    try:
        return vocabulary.SentencePieceVocabulary(path, extra_ids)
    except Exception as error:  # SentencePiece's and protobuf's errors
        raise ValueError(
            f"{os.fspath(path)} is damaged or not a SentencePiece model ({error}). Copy it again"
        ) from None


def huggingface(
    *, path: str | os.PathLike, extra_ids: Count = 0, special_in_text: bool | None = None
):
    """Returns the vocabulary of a Hugging Face checkpoint.

    Args:
      path: directory with tokenizer.json and its accompanying files
        (data/tokenizers/hf_tokenizer.py), or with tokenizer.model only, which is read by
        `from_file`.
      extra_ids: see `from_file`.
      special_in_text: whether special tokens spelled in a text are encoded as special tokens. Set
        it to False for texts that must not end a turn. None: unless tokenizer_config.json has `split_special_tokens`.

    Returns:
      A `data.tokenizers.hf_vocabulary.HFTokenizerVocabulary`, or what `from_file` returns.

    Raises:
      FileNotFoundError: the directory has no tokenizer.
      ValueError: its files are damaged, or the tokenizer does not allow extra ids or `special_in_text`.
    """
    path = mirror.local(path, suffixes=SUFFIXES)
    folder = pathlib.Path(path)
    alone = not os.path.lexists(folder / "tokenizer.json")
    if alone and (model := checkpoint_files.read(folder, SENTENCEPIECE)) is not None:
        if special_in_text is not None:
            raise ValueError(
                f"{path}: special_in_text = {special_in_text} needs a tokenizer.json; the directory has {SENTENCEPIECE} only"
            )
        _try_out(model, folder / SENTENCEPIECE)
        return from_file(path=folder / SENTENCEPIECE, extra_ids=extra_ids)
    return hf_vocabulary.HFTokenizerVocabulary(
        path, extra_ids=extra_ids, special_in_text=special_in_text
    )


def _try_out(model: bytes, path: pathlib.Path) -> None:
    """Raises CheckpointFileError unless a SentencePiece model loads and encodes in a child process with limits."""
    argument = base64.b64encode(model).decode()
    try:
        problem = _probe.call(argument, cpu_seconds=20.0, wall_seconds=60.0)
    except LimitError as error:
        problem = f"trying it out {error}"
    if problem is not None:
        raise checkpoint_files.CheckpointFileError(
            f"{path} is damaged or not a SentencePiece model: {problem}. Copy it again from the checkpoint"
        )


def byte(*, extra_ids: Count = 0):
    """Returns a vocabulary of UTF-8 bytes after pad, EOS and unknown, as ByT5 has it (arXiv 2105.13626), without training.

    Args:
      extra_ids: number of sentinels after the 259 ids, for T5's span corruption.
    """
    return vocabulary.ByteVocabulary(extra_ids)


def characters(*, symbols: str):
    """Returns a vocabulary with one id per character after pad, EOS and unknown, without training.

    Raises:
      ValueError: there are no characters, or a character is repeated.
    """
    return character_vocabulary.CharacterVocabulary(symbols)


def _train(corpus: Texts, settings: Mapping[str, Any], rules: pathlib.Path) -> bytes:
    import sentencepiece as spm

    model = io.BytesIO()
    rules.write_text(_NORMALIZATION)
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_lines(corpus, settings["sample_bytes"], settings["balance"]),
            model_writer=model,
            model_type=settings["algorithm"],
            vocab_size=settings["size"],
            character_coverage=settings["character_coverage"],
            byte_fallback=True,
            split_digits=True,
            required_chars=_REQUIRED,
            normalization_rule_tsv=str(rules),
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=[*WHITE_SPACE_PIECES, *settings.get("special_tokens", ())],
            max_sentence_length=4 * _MAX_LINE,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=3,
            num_threads=1,  # with several threads the file differs between runs
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(_why_untrained(str(error), corpus, settings)) from None
    rules.unlink()
    return _without_path(model.getvalue())


def _why_untrained(error: str, corpus: Texts, settings: Mapping[str, Any]) -> str:
    """Returns SentencePiece's error in the words of the settings, with the remedies that help."""
    failed = (
        f"a vocabulary of {settings['size']:,} pieces (VOCAB_SIZE) cannot be trained on these texts"
    )
    sizes = [corpus.size(source) for source in corpus.sources]
    cut = None in sizes or sum(filter(None, sizes)) > settings["sample_bytes"]
    more = "use more text"
    if cut:
        more += f", or a larger part of it (sample_bytes, now {settings['sample_bytes']:,.0f})"
    if highest := re.search(r"too high .* value <= (\d+)", error):
        return f"{failed}, which give {highest[1]} pieces at most. Set VOCAB_SIZE={highest[1]} or less, or {more}"
    if lowest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"{failed}: bytes, white space and single characters are {lowest[1]} pieces already. Set VOCAB_SIZE={lowest[1]} "
            "or more, or lower character_coverage, by which rare characters become bytes"
        )
    if "sentences_.empty()" in error:
        return f"{failed}: they are empty"
    return f"{failed}: {error.strip().splitlines()[-1]}"


def _without_path(model: bytes) -> bytes:
    """Returns the model without the path of the temporary rule file, whose rules are compiled in."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.ClearField("normalization_rule_tsv")
    return proto.SerializeToString(deterministic=True)


def _budgets(
    sizes: Mapping[str, int | None], sample_bytes: int, balance: float
) -> dict[str, float]:
    """Returns {source: bytes to sample}; `sample_bytes` for a source of unknown size."""
    known = {source: size for source, size in sizes.items() if size}
    scale = sample_bytes / sum(size**balance for size in known.values()) if known else 0
    budgets = {source: min(size, scale * size**balance) for source, size in known.items()}
    return {source: budgets.get(source, sample_bytes) for source in sizes}


def _lines(corpus: Texts, sample_bytes: int, balance: float) -> Iterator[str]:
    """Yields lines of whole documents of all sources, up to each source's share."""
    budgets = _budgets(
        {source: corpus.size(source) for source in corpus.sources}, sample_bytes, balance
    )
    with Bar(
        desc="vocabulary",
        total=int(sum(budgets.values())),
        unit="B",
        unit_scale=True,
        file=sys.stderr,
    ) as bar:
        for source, budget in budgets.items():
            for document in corpus.sample(source, budget):
                bar.update(len(document.text.encode("utf-8")))
                for line in document.text.split("\n"):
                    for start in range(0, len(line), _MAX_LINE):
                        yield line[start : start + _MAX_LINE]
