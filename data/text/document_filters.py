"""Filters of documents: which of those that lie in files are data.

A filter is a frozen dataclass that gin binds and that is called with a document's text and those of its
metadata that the filter asks for; it says whether to keep it. The filters of a set of files are part of
its hash, and what each of them dropped is recorded with its token cache and with the run.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentFilter(abc.ABC):
    """Says of each document whether it is kept. Subclasses are frozen dataclasses."""

    @property
    def name(self) -> str:
        """What its count of dropped documents is called; no two filters of a source share one."""
        return type(self).__name__

    @property
    def keys(self) -> tuple[str, ...]:
        """Metadata it reads: keys of the records, dotted where they lie in others (`meta.set`)."""
        return ()

    def settings(self) -> dict[str, Any]:
        """Everything that decides what is dropped, as JSON. Say more where fields do not say it all."""
        return dataclasses.asdict(self)

    @abc.abstractmethod
    def __call__(self, document: Mapping[str, Any]) -> bool:
        """Whether to keep a document: `text`, and a value for each of `keys`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata(DocumentFilter):
    """Keeps documents by a value of their metadata, such as a language, a licence or a set's name.

    Where the value is a list, as of licences, all of it must be among `keep`, and nothing of it among
    `drop`; an empty list, or none, is not among `keep`.

    Attributes:
      key: of the records, or a column; dotted for one inside of another.
      keep: values to keep; excludes `drop`.
      drop: values to drop.

    Raises:
      ValueError: not exactly one of `keep` and `drop` is given.
    """

    key: str
    keep: Sequence[str] | None = None
    drop: Sequence[str] | None = None

    def __post_init__(self):
        if (self.keep is None) == (self.drop is None):
            raise ValueError(
                f"the filter of {self.key!r} needs either keep or drop, the values to look for"
            )

    @property
    def name(self) -> str:
        return self.key

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def __call__(self, document: Mapping[str, Any]) -> bool:
        value = document[self.key]
        values = value if isinstance(value, list) else [] if value is None else [value]
        if self.drop is not None:
            return not any(value in self.drop for value in values)
        assert self.keep is not None
        return bool(values) and all(value in self.keep for value in values)


class Sieve:
    """Applies filters one after the other and counts what the first that objects drops.

    Attributes:
      dropped: filter -> documents and bytes of text it dropped.
    """

    def __init__(self, filters: Sequence[DocumentFilter]):
        self._filters = tuple(filters)
        self.dropped = {one.name: {"documents": 0, "bytes": 0} for one in filters}

    def keeps(self, text: str, metadata: Mapping[str, Any]) -> bool:
        """Whether all filters keep the document."""
        document = {**metadata, "text": text}
        for one in self._filters:
            if not one(document):
                self.dropped[one.name]["documents"] += 1
                self.dropped[one.name]["bytes"] += len(text.encode("utf-8"))
                return False
        return True


def keys_of(filters: Sequence[DocumentFilter]) -> tuple[str, ...]:
    """Metadata that the filters read, each once."""
    return tuple(dict.fromkeys(key for one in filters for key in one.keys))


def check_names(filters: Sequence[DocumentFilter], where: str) -> None:
    """Raises ValueError where two filters would be counted under one name."""
    names = [one.name for one in filters]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: two filters are called {name!r}; make one of them")


def described(filters: Sequence[DocumentFilter]) -> list[dict[str, Any]]:
    """What is hashed of filters, in their order."""
    return [
        {"class": f"{type(one).__module__}.{type(one).__qualname__}", **one.settings()}
        for one in filters
    ]
