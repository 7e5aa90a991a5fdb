"""The interface between sources and the corpus: candidate documents and their packages."""

import dataclasses
from collections.abc import Callable, Iterable

from data.text.sources import environment


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A whole document (a book, a file, an article) that has not been read yet.

    Attributes:
      id: stable name, equal on every machine. It determines the order of documents, and so which
        documents a byte cap includes.
      read: returns the text. It may raise `UnicodeDecodeError`; an empty text is dropped.
      split_key: determines the split. Documents with equal keys are in the same split, also across
        sources: the docstrings and the code of one file share a key.
    """

    id: str
    read: Callable[[], str]
    split_key: str

    @classmethod
    def of_text(cls, id: str, text: str) -> "Candidate":
        """Returns a candidate with an already known text."""
        return cls(id=id, read=lambda: text, split_key=id)


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of text and the packages it is read from.

    Attributes:
      packages: names of distributions, each optional; `python` is the standard library.
      candidates: environment -> its documents, in any order.
      files: whether documents are files of packages, whose licence headers are stripped and which
        are dropped if generated.
    """

    packages: tuple[str, ...]
    candidates: Callable[[environment.Environment], Iterable[Candidate]]
    files: bool = False
