"""Converts the tokenizer of a GGUF file to the tokenizer files of a Hugging Face checkpoint.

A GGUF file stores pieces, their types, merges or scores, and the *name* of a pre-tokenizer, which
is implemented in code. `PRE_TOKENIZERS` defines these names as in the tokenizers released with the
models. For `smollm`, every digit is split off as a word before merging, as in training.
transformers (5.24) reads such files without this step, and its ids differ where several spaces
precede a digit.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from espalier.common import files
from espalier.common.checkpoint_files import CheckpointFileError
from espalier.data.tokenizers import hf_tokenizer, spm_tokenizer, tokenizer_probe

_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_PREFIX = "tokenizer.ggml."
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How texts are divided into words before merging."""

    split: str | None = None  # regular expression of words; None for GPT-2's
    digits: bool = False  # first split off every digit as a word
    nfc: bool = False  # normalise texts to NFC before splitting
    llama3: bool = False  # take words that are tokens without merging, and begin texts with BOS


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(digits=True)
_LLAMA3 = PreTokenizer(
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", llama3=True
)
_QWEN2 = PreTokenizer(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}", nfc=True)
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "command-r": PreTokenizer(digits=True, nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def write(values: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, with EOS ids, generation_config.json.

    `values` are the metadata of a GGUF file, keys `tokenizer....`; the folder is created if it does not exist.

    Raises:
      CheckpointFileError: the kind of tokenizer or pre-tokenizer is unknown, a key is missing, or the values are damaged.
    """
    with tokenizer_probe.failures_as(CheckpointFileError, "the GGUF file's tokenizer is damaged: "):
        tokenizer, config, ends = _convert(values)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / hf_tokenizer.TOKENIZER))
    # Not synced: the conversion is repeated after a power cut.
    files.write_json(folder / hf_tokenizer.CONFIG, config, synced=False, indent=2, end="\n")
    if ends:
        generation = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
        files.write_json(
            folder / hf_tokenizer.GENERATION, generation, synced=False, indent=2, end="\n"
        )


def _convert(values: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any], list[int]]:
    """Returns the tokenizer, the content of tokenizer_config.json, and the EOS ids."""
    kind: Any = values.get(f"{_PREFIX}model")
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(kind)
    if build is None:
        raise CheckpointFileError(
            f"the kind of the GGUF file's tokenizer is {kind!r} ({_PREFIX}model); supported are gpt2 and "
            "llama. Use the tokenizer files of the original checkpoint"
        )
    tokens = _needed(values, "tokens")
    tokenizer = build(values)
    ids = {name: values.get(f"{_PREFIX}{key}_token_id") for name, key in _NAMES.items()}
    ids = {name: int(id) for name, id in ids.items() if id is not None}
    known = PRE_TOKENIZERS.get(values.get(f"{_PREFIX}pre", ""), _GPT2)
    default = kind == "llama" or known.llama3
    adds_bos = bool(values.get(f"{_PREFIX}add_bos_token", default)) and "bos" in ids
    if adds_bos:
        bos = tokens[ids["bos"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[id] for name, id in ids.items()},
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
    }
    if (template := values.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    ends = [ids.get("eos"), values.get(f"{_PREFIX}eot_token_id")]
    return tokenizer, config, list(dict.fromkeys(int(id) for id in ends if id is not None))


def _needed(values: Mapping[str, Any], key: str) -> Any:
    if (value := values.get(_PREFIX + key)) is None:
        raise CheckpointFileError(
            f"the GGUF file has no {_PREFIX}{key}: it was written without its tokenizer. Use the "
            "tokenizer files of the original checkpoint"
        )
    return value


def _byte_level(values: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE tokenizer, whose pieces represent bytes as in GPT-2."""
    name: Any = values.get(f"{_PREFIX}pre")
    if name not in PRE_TOKENIZERS:
        raise CheckpointFileError(
            f"the GGUF file's pre-tokenizer is {name!r} ({_PREFIX}pre); supported are "
            f"{', '.join(PRE_TOKENIZERS)}. Use the tokenizer files of the original checkpoint"
        )
    tokens = _needed(values, "tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _needed(values, "merges")]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    known = PRE_TOKENIZERS[name]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=known.llama3))
    if known.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if known.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if known.split is not None:
        steps.append(pre_tokenizers.Split(Regex(known.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=known.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    types = values.get(f"{_PREFIX}token_type") or [spm_tokenizer.NORMAL] * len(tokens)
    spm_tokenizer.add_tokens(tokenizer, tokens, types)
    return tokenizer


def _sentencepiece(values: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Returns a SentencePiece BPE tokenizer with byte fallback.

    Unless the file disables `add_space_prefix`, a space is inserted before a text and after each
    special token, as in the tokenizer files released for these models.
    """
    tokens, scores = _needed(values, "tokens"), _needed(values, "scores")
    types = [int(type) for type in _needed(values, "token_type")]
    tokenizer = tokenizers.Tokenizer(spm_tokenizer.bpe(tokens, scores, types))
    prefix = bool(values.get(f"{_PREFIX}add_space_prefix", True))
    space: list[normalizers.Normalizer] = [normalizers.Replace(" ", spm_tokenizer.SPACE)]
    if prefix:
        space.insert(0, normalizers.Prepend(spm_tokenizer.SPACE))
    tokenizer.normalizer = normalizers.Sequence(space)
    steps = [decoders.Replace(spm_tokenizer.SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    spm_tokenizer.add_tokens(tokenizer, tokens, types)
    return tokenizer
