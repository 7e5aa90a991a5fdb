"""Tries out a tokenizer.json or a SentencePiece model; runs in a child process with limits, before it is loaded for use.

The library `tokenizers` fails by Rust panics, and by loops and allocations of any size. What a text grows to is
bounded here for every text. What a text costs is only tried out, with `TEXTS`: a regular expression of the
tokenizer may still take up to ten million steps at each character of another text, and then fails.
"""

import base64
import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import sentencepiece
import tokenizers

MAX_IDS = 1 << 24
MAX_PIECE = 1 << 16  # characters
MAX_GROWTH = 1000  # bytes that normalizer or decoder can make of one byte

# Runs and alternations, on which regular expressions take the most steps; beyond them, ordinary text.
_RUNS = ("a", " ", "0", "\n", "-", "ab", "a ", "a1", "\u3042", "\U0001f642")
TEXTS = (
    *(part * 1000 + end for part in _RUNS for end in ("", "!", "\x00")),
    "It's 10.25 % of na\u00efve a\u0301 \u65e5\u672c\u8a9e\t\tdef f(x):\n    return x  # \u2581",
    "",
)


@contextlib.contextmanager
def failures_as(error_class: type[Exception], what: str) -> Iterator[None]:
    """Raises `error_class` for any failure of the library, whose panics are no `Exception`."""
    try:
        yield
    except error_class:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise error_class(f"{what}{str(error)[:500] or type(error).__name__}") from None


def check(content: str) -> str | None:
    """Returns the problem of a tokenizer.json in words; None if it loads, encodes and decodes."""
    try:
        with failures_as(ValueError, ""):
            tokenizer = tokenizers.Tokenizer.from_str(content)
            tokenizer.no_padding()
            tokenizer.no_truncation()
        return _sizes(tokenizer) or _trial(tokenizer)
    except ValueError as error:
        return str(error)


def _sizes(tokenizer: tokenizers.Tokenizer) -> str | None:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if (largest := max(vocabulary.values(), default=0)) >= MAX_IDS:
        return f"it has the id {largest:,}; ids are supported below {MAX_IDS:,}"
    if (longest := max(map(len, vocabulary), default=0)) > MAX_PIECE:
        return f"a token has {longest:,} characters; supported are {MAX_PIECE:,}"
    for part in ("normalizer", "decoder"):
        if (step := getattr(tokenizer, part)) is not None:
            factor = _growth(json.loads(step.__getstate__()))
            if factor > MAX_GROWTH:
                return (
                    f"its {part} can make {factor:,} bytes of one byte of text; supported are "
                    f"{MAX_GROWTH:,}"
                )
    return None


def _growth(step: dict[str, Any]) -> int:
    """Returns the largest number of bytes that a normalizer or decoder makes of one byte."""
    kind = step["type"]
    if kind == "Sequence":
        parts = step.get("normalizers", step.get("decoders", ()))
        return math.prod(map(_growth, parts))
    if kind == "Replace":
        content, pattern = len(step["content"].encode()), step["pattern"].get("String")
        if pattern:
            return max(1, -(-content // len(pattern.encode())))
        return 1 + content  # A regular expression may match between any two characters.
    if kind == "Prepend":
        return 1 + len(step["prepend"].encode())
    if kind == "Precompiled":
        blob = base64.b64decode(step["precompiled_charsmap"])
        texts = blob[4 + int.from_bytes(blob[:4], "little") :]
        return max(1, *map(len, texts.split(b"\0")))
    return 1  # at most a small constant


def _trial(tokenizer: tokenizers.Tokenizer) -> str | None:
    for text in TEXTS:
        try:
            tokenizer.encode(text)
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception:  # such as a word without a token, which only such texts have
            continue
        except BaseException as error:
            return f"it crashes on the text {text[:20]!r}, {len(text)} characters long: {error}"
    return None


def check_sentencepiece(model: str) -> str | None:
    """Returns the problem of a SentencePiece model, whose bytes are given in Base64; None if it loads, encodes and decodes."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(model))
        for text in TEXTS:
            processor.decode(processor.encode(text))
    except MemoryError:
        raise
    except Exception as error:
        return f"{error}"[:500]
    return None
