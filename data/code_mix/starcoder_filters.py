"""Filters of source files that StarCoder's data went through (arXiv 2305.06161, section 3).

Gin binds them for a set of files: see data/text/document_filters.py. Some are for some languages only, which the
records of The Stack name under `lang`.
"""

import abc
import dataclasses
import html.parser
from collections.abc import Mapping, Sequence
from typing import Any

from data.text.document_filters import DocumentFilter


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Filter(DocumentFilter):
    """Keeps files of other languages than its own, and the good ones of those.

    Attributes:
      languages: values of `lang` that it is for; None for all files, of which it then reads no `lang`.
    """

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
        """Whether to keep a file of its languages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineLengths(_Filter):
    """Drops files with long lines, which are data or minified.

    Attributes:
      longest: characters that a line may have.
      mean: characters that lines may have on average.
    """

    longest: int = 1000
    mean: float = 100.0

    def good(self, text: str) -> bool:
        lengths = list(map(len, text.splitlines()))
        return not lengths or (
            max(lengths) <= self.longest and sum(lengths) <= self.mean * len(lengths)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Letters(_Filter):
    """Drops files that are mostly numbers and signs.

    Attributes:
      least: share of the characters that are letters.
    """

    least: float = 0.25

    def good(self, text: str) -> bool:
        return sum(map(str.isalpha, text)) >= self.least * len(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class XmlHeader(_Filter):
    """Drops XML that has the ending of another language.

    Attributes:
      characters: of the beginning, in which all of the header stands.
    """

    characters: int = 100

    def good(self, text: str) -> bool:
        return "<?xml version=" not in text[: self.characters]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisibleText(_Filter):
    """Drops pages that show little text.

    Attributes:
      share: of a file's characters that a reader sees.
      characters: that a reader sees at least.
    """

    languages: Sequence[str] | None = ("HTML",)
    share: float = 0.2
    characters: int = 100

    def good(self, text: str) -> bool:
        seen = _visible(text)
        return seen >= self.characters and seen >= self.share * len(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSize(_Filter):
    """Drops data files that are very short or long.

    Attributes:
      least, most: characters of a file.
    """

    languages: Sequence[str] | None = ("JSON", "YAML")
    least: int = 50
    most: int = 5000

    def good(self, text: str) -> bool:
        return self.least <= len(text) <= self.most


class _Reader(html.parser.HTMLParser):
    """Counts the characters of a page that are no tag, comment, script, style or surplus space."""

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
