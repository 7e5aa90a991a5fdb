"""What a source hands to the corpus: documents that can be read, and where they come from."""

import dataclasses
from collections.abc import Callable, Iterable

from data.text.sources import environment


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A whole document (a book, a file, an article) that has not been read yet.

    Attributes:
      id: stable name, the same on every machine: the order of documents, what a byte cap keeps and
        the validation split depend on nothing else.
      read: returns the text. It may raise `UnicodeDecodeError`; an empty text is dropped.
      split_key: documents of equal keys go to the same split, also across sources. The docstrings
        and the code of one file share a key.
    """

    id: str
    read: Callable[[], str]
    split_key: str

    @classmethod
    def of_text(cls, id: str, text: str) -> "Candidate":
        """A candidate whose text is at hand."""
        return cls(id=id, read=lambda: text, split_key=id)


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of text and the packages it is read from.

    Attributes:
      packages: names of distributions, each optional; `python` is the standard library.
      candidates: lists the documents that an environment holds, in any order.
      files: documents are files of a package: licence heads are cut, generated files dropped.
    """

    packages: tuple[str, ...]
    candidates: Callable[[environment.Environment], Iterable[Candidate]]
    files: bool = False
