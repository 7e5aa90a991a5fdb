"""Rules that keep a document, drop it with a reason, or trim what repeats in every file."""

import re
import unicodedata

# A data table or minified file rather than something written by a person (the line rules that
# public code corpora use).
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
    """Unix line ends, composed characters (NFC), no byte-order mark, one newline at the end."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    return unicodedata.normalize("NFC", text).strip("\n") + "\n"


def strip_licence(text: str) -> str:
    """Drops a leading comment that is a licence or copyright notice.

    The same few hundred bytes stand at the head of thousands of files: kept, they would be most of
    what a small model learns, and the longest text that training and validation share.
    """
    for pattern in (_HASH_COMMENT, _SLASH_COMMENT, _BLOCK_COMMENT):
        head = pattern.match(text)
        if head and _LICENCE.search(head.group()):
            return text[head.end() :].lstrip("\n")
    return text


def reason_to_drop(text: str, *, min_bytes: int, max_bytes: int, code: bool) -> str | None:
    """Why a document should not enter the corpus, or None.

    Args:
      text: the document.
      min_bytes: shortest document kept, in UTF-8 bytes.
      max_bytes: longest document kept.
      code: also apply the rules for files: not generated, no data tables, no minified lines.
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
