"""What characters do in a text: which of them are seen, and where words end."""

import itertools
import unicodedata

# Characters without a glyph: soft hyphens and joiners, marks of direction, invisible operators, tags. Texts that
# hold them are worth a look: they may hide what people do not see and models read.
_INVISIBLE_RANGES = (
    *((0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x180E, 0x180E), (0x200B, 0x200F)),
    *((0x202A, 0x202E), (0x2060, 0x206F), (0xFEFF, 0xFEFF), (0xE0001, 0xE007F)),
)
INVISIBLE = frozenset(
    chr(code) for first, last in _INVISIBLE_RANGES for code in range(first, last + 1)
)
_WITHOUT_INVISIBLE = dict.fromkeys(map(ord, INVISIBLE))
# Those that change nothing of what is seen beside them: where a line may break (soft hyphen, zero-width space, word
# joiner, byte order mark), and operators that are only thought. Joiners choose letter forms, conjuncts and emoji,
# marks of direction the order of letters, and tags flags: texts that differ in them look different.
_WITHOUT_EFFECT = dict.fromkeys((0xAD, 0x200B, *range(0x2060, 0x2065), 0xFEFF))
# How Unicode's names begin of characters of scripts that do not separate words by spaces.
_UNSPACED = {
    *("CJK", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH", "HIRAGANA", "KATAKANA", "BOPOMOFO"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
}


def as_seen(text: str) -> str:
    """The text without invisible characters of no effect: the same for texts that look the same."""
    return text.translate(_WITHOUT_EFFECT)


def is_blank(text: str) -> bool:
    """Whether nothing is seen of it: white space and invisible characters, whatever their effect on others."""
    return not text.translate(_WITHOUT_INVISIBLE).strip()


def shared_words(one: str, other: str) -> int:
    """How many characters the words take that both texts begin with.

    Something is left of both, and the space before it is not of the words, as tokenizers have it.
    """
    both = zip(one, other, strict=False)
    size = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], both))
    size = min(size, *(len(text.rstrip()) - 1 for text in (one, other)))
    while size > 0 and any(_divides_word(one[size - 1], text[size]) for text in (one, other)):
        size -= 1
    if size > 0 and one[size - 1] == " ":
        size -= 1
    return max(size, 0)


def _divides_word(before: str, after: str) -> bool:
    """Whether no word can end between two characters of a text."""
    if before.isspace() or after.isspace():
        return False
    if unicodedata.category(after).startswith("M"):  # a mark, which belongs to the letter before it
        return True
    names = (unicodedata.name(one, "").replace("-", " ") for one in (before, after))
    return _UNSPACED.isdisjoint(name.partition(" ")[0] for name in names)
