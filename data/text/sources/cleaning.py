"""Cleaning rules: normalise a document, strip its licence header, or give a reason to drop it."""

import re
import unicodedata

# Limits that exclude data tables and minified files, as in public code corpora.
MAX_LINE_LENGTH = 1000
MEAN_LINE_LENGTH = 120
MIN_LETTER_SHARE = 0.25
GENERATED = re.compile(
    r"auto-?generated|automatically generated|generated (by|from|automatically)|do not edit|"
    r"machine generated",
    re.IGNORECASE,
)
GENERATED_WITHIN = 400

_HASH_COMMENT = re.compile(r"(?:#[^\n]*\n|[ \t]*\n)+")
_SLASH_COMMENT = re.compile(r"(?:\s*(?://[^\n]*\n)+)+")
_BLOCK_COMMENT = re.compile(r"(?:\s*/\*.*?\*/[ \t]*\n?)+", re.DOTALL)
_LICENCE = re.compile(r"licen[sc]e|copyright|all rights reserved", re.IGNORECASE)


def normalise(text: str) -> str:
    """Returns the text in NFC, with Unix line ends, one final newline and no byte-order mark."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    return unicodedata.normalize("NFC", text).strip("\n") + "\n"


def strip_licence(text: str) -> str:
    """Returns the text without a leading comment that is a licence or copyright notice.

    Thousands of files begin with the same few hundred bytes. A small model would mostly learn these
    bytes, and they would be the longest text shared by training and validation.
    """
    for pattern in (_HASH_COMMENT, _SLASH_COMMENT, _BLOCK_COMMENT):
        head = pattern.match(text)
        if head and _LICENCE.search(head.group()):
            return text[head.end() :].lstrip("\n")
    return text


def reason_to_drop(text: str, *, min_bytes: int, max_bytes: int, code: bool) -> str | None:
    """Returns the reason to drop a document from the corpus, or None.

    Sizes are UTF-8 bytes. Of `code`, generated files, tables and minified files are dropped too.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size < min_bytes:
        return "too short"
    if size > max_bytes:
        return "too long"
    if "\0" in text:
        return "binary"
    if not code:
        return None
    if GENERATED.search(text[:GENERATED_WITHIN]):
        return "generated"
    lines = text.splitlines()
    longest = max(map(len, lines))
    if longest > MAX_LINE_LENGTH or len(text) / len(lines) > MEAN_LINE_LENGTH:
        return "long lines"
    if sum(map(str.isalpha, text)) < MIN_LETTER_SHARE * len(text):
        return "few letters"
    return None
