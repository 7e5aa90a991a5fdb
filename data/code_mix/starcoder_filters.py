"""The filters of StarCoder for source files (arXiv 2305.06161, section 3).

Gin binds them for a set of files: see data/text/document_filters.py. Some filters apply to certain languages only;
records of The Stack have their language under `lang`.
"""

import abc
import dataclasses
import html.parser
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common.ranges import Count, Fraction, Positive
from espalier.data.text.document_filters import DocumentFilter


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Filter(DocumentFilter):
    """Keeps all files in languages it does not apply to, and the good files in the others."""

    # values of `lang` the filter applies to; None for all files, without reading `lang`
    languages: Sequence[str] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return () if self.languages is None else ("lang",)

    def __call__(self, document: Mapping[str, Any]) -> bool:
        if self.languages is not None and document["lang"] not in self.languages:
            return True
        return self.good(document["text"])

    @abc.abstractmethod
    def good(self, text: str) -> bool:
        """Returns whether to keep a file in a language the filter applies to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineLengths(_Filter):
    """Drops files with long lines, which are data or minified."""

    longest: Count = 1000  # most characters of a line
    mean: Positive = 100.0  # most characters of a line on average over the file

    def good(self, text: str) -> bool:
        lengths = list(map(len, text.splitlines()))
        return not lengths or (
            max(lengths) <= self.longest and sum(lengths) <= self.mean * len(lengths)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Letters(_Filter):
    """Drops files that are mostly numbers and signs."""

    least: Fraction = 0.25  # least share of letters among the characters

    def good(self, text: str) -> bool:
        return sum(map(str.isalpha, text)) >= self.least * len(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class XmlHeader(_Filter):
    """Drops XML files with the file extension of another language."""

    # number of characters at the beginning that are searched for the XML header
    characters: Count = 100

    def good(self, text: str) -> bool:
        return "<?xml version=" not in text[: self.characters]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisibleText(_Filter):
    """Drops pages that show little text."""

    languages: Sequence[str] | None = ("HTML",)
    share: Fraction = 0.2  # least share of visible characters
    characters: Count = 100  # least number of visible characters

    def good(self, text: str) -> bool:
        seen = _visible(text)
        return seen >= self.characters and seen >= self.share * len(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSize(_Filter):
    """Drops data files that are very short or long.

    Attributes:
      least, most: bounds of the number of characters.
    """

    languages: Sequence[str] | None = ("JSON", "YAML")
    least: Count = 50
    most: Count = 5000

    def good(self, text: str) -> bool:
        return self.least <= len(text) <= self.most


class _Reader(html.parser.HTMLParser):
    """Counts visible characters of a page: no tags, comments, scripts, styles or repeated spaces."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style") and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.seen += len(" ".join(data.split()))


def _visible(text: str) -> int:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader.seen
