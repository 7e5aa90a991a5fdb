"""Filters that keep or drop the documents of data files.

A filter is a frozen dataclass that gin binds. It is called with a document's text and the metadata
that the filter requests, and returns whether to keep the document. The filters of a set of files
are part of its hash. The numbers of documents and bytes dropped by each filter are recorded with
the token cache and with the run.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.data.cache import fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentFilter(abc.ABC):
    """Decides whether to keep a document. Subclasses are frozen dataclasses."""

    @property
    def name(self) -> str:
        """Name of the count of dropped documents, unique among the filters of a source."""
        return type(self).__name__

    @property
    def keys(self) -> tuple[str, ...]:
        """Metadata that the filter reads: keys of records, dotted for nested keys (`meta.set`)."""
        return ()

    def settings(self) -> dict[str, Any]:
        """Returns everything that determines which documents are dropped, as JSON.

        Override this where the fields do not suffice, such as for the content of a file.
        """
        return dataclasses.asdict(self)

    @abc.abstractmethod
    def __call__(self, document: Mapping[str, Any]) -> bool:
        """Returns whether to keep a document, a mapping with `text` and each of `keys`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata(DocumentFilter):
    """Keeps documents by a value of their metadata, such as a language, a licence or a set's name.

    The value can be a list, for example of licences. With `keep`, all its items must be among
    `keep`, and an empty list or null drops the document. With `drop`, no item may be among `drop`.

    Raises:
      ValueError: both or neither of `keep` and `drop` are set.
    """

    key: str  # key of the records, or a column; dotted for a nested key
    keep: Sequence[str] | None = None  # values to keep; excludes `drop`
    drop: Sequence[str] | None = None  # values to drop

    def __post_init__(self):
        if (self.keep is None) == (self.drop is None):
            raise ValueError(
                f"the filter of {self.key!r} needs either keep or drop, a list of values"
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
    """Applies filters in order; a dropped document counts for the first filter that drops it.

    Attributes:
      dropped: filter -> numbers of documents and bytes of text that it dropped.
      keys: metadata keys that the filters read, without duplicates.
    """

    def __init__(self, filters: Sequence[DocumentFilter]):
        self._filters = tuple(filters)
        self.dropped = {one.name: {"documents": 0, "bytes": 0} for one in filters}
        self.keys = tuple(dict.fromkeys(key for one in filters for key in one.keys))

    def keeps(self, text: str, metadata: Mapping[str, Any]) -> bool:
        """Returns whether all filters keep the document; counts it if one drops it."""
        document = {**metadata, "text": text}
        for one in self._filters:
            if not one(document):
                self.dropped[one.name]["documents"] += 1
                self.dropped[one.name]["bytes"] += len(text.encode("utf-8"))
                return False
        return True


def check_names(filters: Sequence[DocumentFilter], where: str) -> None:
    """Raises ValueError if two filters have the same name."""
    names = [one.name for one in filters]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: two filters have the name {name!r}; combine them into one")


def described(filters: Sequence[DocumentFilter]) -> list[dict[str, Any]]:
    """Returns the class and settings of each filter, in order, which are hashed."""
    return [{"class": fingerprint.name_of(type(one)), **one.settings()} for one in filters]
