"""Reads the tokenizer files of a Hugging Face checkpoint, without TensorFlow.

`read` reads these files of a directory:

    tokenizer.json             the tokenizer, which the library `tokenizers` runs
    tokenizer_config.json      names of its special tokens, whether texts begin with BOS or
                               spell special tokens, chat template
    special_tokens_map.json    names of special tokens that are missing from tokenizer_config.json
    chat_template.jinja        the chat template, which overrides tokenizer_config.json
    additional_chat_templates/ further chat templates by name
    generation_config.json     EOS ids; else those in config.json, else the tokenizer's EOS

Ids are the ids of tokenizer.json. The model's embedding table may be larger; its last rows are
padding. Encoding adds no special tokens; `adds_bos` is True if the model expects BOS before a text.
Special tokens spelled in a text are encoded as special tokens, unless `special_in_text` is False, by
default if tokenizer_config.json has `split_special_tokens`.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import tokenizers

from espalier.common import checkpoint_files
from espalier.common.checkpoint_files import CheckpointFileError
from espalier.data.limited_process import LimitedProcess, LimitError
from espalier.data.tokenizers import chat_template, tokenizer_probe

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION = "generation_config.json"
MODEL = "config.json"
SENTENCEPIECE = "tokenizer.model"
# All files of a tokenizer, which are copied with it, besides further chat templates.
FILES = (
    *(TOKENIZER, CONFIG, SPECIAL_TOKENS, GENERATION, SENTENCEPIECE),
    *("added_tokens.json", "vocab.json", "merges.txt", chat_template.FILE),
)
CPU_SECONDS = 20.0  # of trying out a tokenizer.json
WALL_SECONDS = 60.0
# Special tokens of all tokenizers; other entries `..._token` may be settings.
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)

_probe = LimitedProcess("espalier.data.tokenizers.tokenizer_probe:check", memory_bytes=4 << 30)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The content of tokenizer files."""

    path: str  # directory of the files
    content: bytes  # bytes of tokenizer.json
    tokens: Mapping[str, str]  # name -> special token, such as `bos_token` -> `<s>`
    eos_ids: tuple[int, ...]  # all ids that end a continuation
    adds_bos: bool  # whether the model expects BOS before a text
    special_in_text: bool  # whether special tokens spelled in a text are special tokens by default
    chat_template: chat_template.ChatTemplate | None  # the chat templates, or None

    def id(self, name: str) -> int | None:
        """Returns the id of a special token by its name, such as `bos_token`, or None.

        Raises:
          CheckpointFileError: the named token is missing from tokenizer.json.
        """
        if (text := self.tokens.get(name)) is None:
            return None
        token_id = load(self.content).token_to_id(text)
        if token_id is None:
            raise CheckpointFileError(
                f"{self.path}/{CONFIG}: {name} is {text!r}, which {TOKENIZER} does not have. Correct it, "
                "or copy both files from the same checkpoint"
            )
        return token_id


def read(path: str | os.PathLike) -> TokenizerFiles:
    """Reads the tokenizer in a directory.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      CheckpointFileError: a file is damaged, or the files are inconsistent.
    """
    folder = pathlib.Path(path)
    content = checkpoint_files.read(folder, TOKENIZER)
    if content is None:
        raise FileNotFoundError(_missing(folder))
    try:
        load(content)
    except CheckpointFileError as error:
        raise CheckpointFileError(
            f"{folder / TOKENIZER} is damaged or not a tokenizer: {error}. Copy it again from the checkpoint"
        ) from None
    config = checkpoint_files.read_json(folder, CONFIG)
    tokens = _named_tokens(
        folder / SPECIAL_TOKENS, checkpoint_files.read_json(folder, SPECIAL_TOKENS)
    )
    tokens |= _named_tokens(folder / CONFIG, config)
    for key in ("add_bos_token", "split_special_tokens"):
        if not isinstance(value := config.get(key), bool | None):
            raise CheckpointFileError(f"{folder / CONFIG}: {key} is {value!r}, not true or false")
    files = TokenizerFiles(
        path=os.fspath(folder),
        content=content,
        tokens=tokens,
        eos_ids=(),
        adds_bos=False,
        special_in_text=not config.get("split_special_tokens"),
        chat_template=chat_template.read(folder, config, tokens),
    )
    return dataclasses.replace(
        files,
        eos_ids=_eos_ids(folder, files.id("eos_token")),
        adds_bos=_adds_bos(content, config.get("add_bos_token"), files.id("bos_token")),
    )


def copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies the files of a tokenizer into an existing directory.

    Raises:
      CheckpointFileError: a file is too large, or a link leads out of the directory of the source.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    folder = source / chat_template.FOLDER
    templates = [f"{folder.name}/{path.name}" for path in chat_template.further_files(source)]
    if templates:
        (target / folder.name).mkdir(exist_ok=True)
    for name in (*FILES, *templates):
        if (content := checkpoint_files.read(source, name)) is not None:
            (target / name).write_bytes(content)


@functools.lru_cache(maxsize=8)
def load(content: bytes, extra_ids: int = 0, special_in_text: bool = True) -> tokenizers.Tokenizer:
    """Returns the tokenizer in a tokenizer.json, without padding, truncation and post-processor.

    A post-processor adds special tokens, which vocabularies leave to tasks, and may move offsets to characters outside of a token.

    Args:
      content: bytes of the file.
      extra_ids: number of sentinels `<extra_id_0>`, ... to add, in descending order as for T5.
      special_in_text: whether special tokens spelled in a text are encoded as special tokens.

    Raises:
      CheckpointFileError: the file is damaged or needs too much time or memory; or the tokenizer already has such
        sentinels, or its ids have gaps.
    """
    _check(content)
    tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.post_processor = None
    tokenizer.encode_special_tokens = not special_in_text
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
    if any(tokenizer.token_to_id(sentinel) is not None for sentinel in sentinels):
        raise CheckpointFileError(f"the tokenizer already has {sentinels[-1]}: set extra_ids=0")
    size = num_ids(tokenizer)
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in sentinels])
    if num_ids(tokenizer) != size + extra_ids:
        raise CheckpointFileError("the tokenizer's ids have gaps, so extra_ids cannot be added")
    return tokenizer


@functools.lru_cache(maxsize=8)
def _check(content: bytes) -> None:
    """Raises CheckpointFileError unless a tokenizer.json loads and encodes in a child process with limits."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointFileError(f"it is not UTF-8 at byte offset {error.start}") from None
    try:
        problem = _probe.call(text, cpu_seconds=CPU_SECONDS, wall_seconds=WALL_SECONDS)
    except LimitError as error:
        raise CheckpointFileError(f"trying it out {error}") from None
    if problem is not None:
        raise CheckpointFileError(problem)


def failures(path: str | os.PathLike) -> AbstractContextManager[None]:
    """Raises CheckpointFileError for any failure of the library on a text, panics included."""
    return tokenizer_probe.failures_as(
        CheckpointFileError, f"{os.fspath(path)}/{TOKENIZER} fails on this text: "
    )


def num_ids(tokenizer: tokenizers.Tokenizer) -> int:
    """Returns the number of ids: one more than the largest id."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _missing(folder: pathlib.Path) -> str:
    if not folder.is_dir():
        return f"no directory {os.fspath(folder)!r} with tokenizer files"
    if (folder / SENTENCEPIECE).is_file():
        return (
            f"{os.fspath(folder)!r} has no {TOKENIZER}, but a SentencePiece model: use "
            f"vocabularies.from_file(path='{folder / SENTENCEPIECE}')"
        )
    return (
        f"{os.fspath(folder)!r} has neither {TOKENIZER} nor {SENTENCEPIECE}: copy the tokenizer files of "
        "the checkpoint there"
    )


def _named_tokens(path: pathlib.Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the entries `..._token` of a file, which are texts or objects with the text as `content`."""
    tokens = {}
    for name, value in values.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
        elif name in _NAMED and value is not None:
            raise CheckpointFileError(
                f"{path}: {name} is {str(value)[:200]}, not the text of a token"
            )
    return tokens


def _eos_ids(folder: pathlib.Path, own: int | None) -> tuple[int, ...]:
    for name in (GENERATION, MODEL):
        value = checkpoint_files.read_json(folder, name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        known = range(tokenizer_probe.MAX_IDS)
        if not ids or not all(type(id) is int and id in known for id in ids):
            raise CheckpointFileError(
                f"{folder / name}: eos_token_id is {str(value)[:200]!r}, not an id or a list of ids"
            )
        return tuple(ids)
    return () if own is None else (own,)


def _adds_bos(content: bytes, config: bool | None, bos_id: int | None) -> bool:
    """Returns `add_bos_token` of tokenizer_config.json, else whether the post-processor adds BOS."""
    if bos_id is None:
        return False
    if config is not None:
        return bool(config)
    tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    tokenizer.no_padding()
    return tokenizer.encode("a").ids[:1] == [bos_id]
