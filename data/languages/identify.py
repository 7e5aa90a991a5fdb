"""In which language a text is: by the scripts of its letters alone, or by a statistical detector of languages.

A model that was asked in one language and answers in another passes most tests of form. A text is checked line by line,
because answers often begin in the right language and drift. Code between fences and short lines are not judged.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from espalier.common.ranges import check_choice
from espalier.data.languages import table
from espalier.data.languages.table import Language

Kind = Literal["lingua", "script"]
# Letters that a line needs to be judged. One of Chinese, Japanese or Korean says as much as three of an alphabet.
MIN_LETTERS = 15
_DENSE = frozenset({"Hani", "Hira", "Kana", "Hang"})
_DENSE_WEIGHT = 3
_LEAST_SHARE = 0.5  # of a line's letters in the scripts of the language
_FENCED = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
# Addresses and code. In a run without spaces only its beginning, which code with a space may end in, is tried as an address
# with @: what does not match there matches nowhere in the run, and every try reads the run to its end.
_NO_WORDS = re.compile(r"https?://\S+|(?<!\S)\S+@\S+|`[^`\s]*`|`[^`\n]*`(\S+@\S+)?")
_NOT_LETTERS = frozenset({"Zyyy", "Zinh", "Zzzz"})  # common, inherited, unknown


def script_counts(text: str) -> collections.Counter[str]:
    """Returns the number of letters of each script, by its code of ISO 15924; letters of no script do not count."""
    counts: collections.Counter[str] = collections.Counter()
    for letter, number in collections.Counter(text).items():
        if letter.isalpha() and (script := _script(letter)) not in _NOT_LETTERS:
            counts[script] += number
    return counts


def script_of(text: str) -> str | None:
    """Returns the most frequent script of a text's letters; None without letters."""
    counts = script_counts(text)
    return max(counts, key=lambda script: (counts[script], script)) if counts else None


@functools.lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    from fontTools import unicodedata

    return unicodedata.script(letter)


class Detector(Protocol):
    """The interface of detectors; `name` is recorded with results."""

    name: str

    def mismatches(self, lines: Sequence[str], language: Language) -> list[str]:
        """Returns "" for each line that is in the language, else the code of the language or script that it is in."""


class ByScript:
    """Compares the scripts of letters; it cannot tell languages that share a script apart."""

    name = "script"

    def mismatches(self, lines: Sequence[str], language: Language) -> list[str]:
        return [_other_script(line, language) for line in lines]


class ByLingua:
    """The detector of the package lingua, among the 23 languages.

    A text in any other language gets the most similar one of the 23.
    """

    def __init__(self) -> None:
        import importlib.metadata

        try:
            import lingua
        except ImportError:
            raise ValueError(
                "The detector 'lingua' needs its package: pip install -e '.[languages]', or choose 'script'."
            ) from None
        isos = [getattr(lingua.IsoCode639_1, code.upper()) for code in table.LANGUAGES]
        self._detector = lingua.LanguageDetectorBuilder.from_iso_codes_639_1(*isos).build()
        self.name = f"lingua {importlib.metadata.version('lingua-language-detector')}"

    def languages(self, lines: Sequence[str]) -> list[str | None]:
        """Returns the code of each line's language; None where it cannot be told."""
        detected = self._detector.detect_languages_in_parallel_of(list(lines))
        return [None if one is None else one.iso_code_639_1.name.lower() for one in detected]

    def mismatches(self, lines: Sequence[str], language: Language) -> list[str]:
        return [
            "" if code == language.code else code or "unknown" for code in self.languages(lines)
        ]


def detector(kind: Kind = "lingua") -> Detector:
    """Returns a detector; that of lingua holds 0.4 GB of memory, once for all callers.

    Raises:
      ValueError: an unknown kind, or the package lingua is missing.
    """
    check_choice("detector", kind, Kind)
    return ByScript() if kind == "script" else _lingua()


def language_of(text: str) -> str | None:
    """Returns the code of the language of most of a text's lines, by lingua; None where it cannot be told.

    Raises:
      ValueError: the package lingua is missing.
    """
    counts = collections.Counter(filter(None, _lingua().languages(judged_lines(text) or [text])))
    return max(counts, key=lambda code: (counts[code], code)) if counts else None


language_of.languages = tuple(table.LANGUAGES)  # type: ignore[attr-defined]


@functools.cache
def _lingua() -> ByLingua:
    return ByLingua()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """The lines of a text by language.

    Attributes:
      lines: number of lines that were judged.
      others: languages or scripts of those that are not in the language -> their number.
    """

    lines: int
    others: Mapping[str, int]

    @property
    def right(self) -> int:
        """The number of lines in the language."""
        return self.lines - sum(self.others.values())

    @property
    def passes(self) -> bool | None:
        """Whether all judged lines are in the language; None if none was judged."""
        return self.right == self.lines if self.lines else None


def judged_lines(text: str, *, min_letters: int = MIN_LETTERS) -> list[str]:
    """Returns the lines of a text, without code and addresses, that have enough letters to be judged."""
    prose = _NO_WORDS.sub(lambda found: "  " if found[1] else " ", _FENCED.sub("\n", text))
    return [line.strip() for line in prose.splitlines() if _weight(line) >= min_letters]


def check(
    text: str, language: Language | str, by: Detector, *, min_letters: int = MIN_LETTERS
) -> Checked:
    """Returns the lines of a text in a language and in others.

    A short text without a line of enough letters is judged as one line if its script is another one, which a few
    letters show.

    Raises:
      ValueError: unknown language.
    """
    language = table.find(language) if isinstance(language, str) else language
    lines = judged_lines(text, min_letters=min_letters)
    if not lines and (other := _other_script(text, language)):
        return Checked(lines=1, others={other: 1})
    others = collections.Counter(filter(None, by.mismatches(lines, language) if lines else ()))
    return Checked(lines=len(lines), others=dict(others))


def pass_rates(checked: Sequence[Checked]) -> dict[str, Any]:
    """Returns counts and pass rates of texts that should be in one language.

    Returns:
      'texts' and 'judged', their numbers; 'texts_passed', the share of judged texts all of whose lines are in the
      language, 'lines_passed', the share of lines, both None without any; 'lines', and 'others': language or script ->
      number of lines.
    """
    others: collections.Counter[str] = collections.Counter()
    for one in checked:
        others.update(one.others)
    judged = [one.passes for one in checked if one.passes is not None]
    lines = sum(one.lines for one in checked)
    return {
        "texts": len(checked),
        "judged": len(judged),
        "texts_passed": sum(judged) / len(judged) if judged else None,
        "lines": lines,
        "lines_passed": sum(one.right for one in checked) / lines if lines else None,
        "others": dict(others.most_common()),
    }


def _weight(line: str) -> int:
    counts = script_counts(line)
    return sum(n * (_DENSE_WEIGHT if script in _DENSE else 1) for script, n in counts.items())


def _other_script(text: str, language: Language) -> str:
    """Returns the script of a text if fewer than half of its letters are in those of the language, else ""."""
    counts = script_counts(text)
    own = sum(counts[script] for script in language.scripts)
    if own >= _LEAST_SHARE * counts.total():
        return ""
    return script_of(text) or ""
