"""Detects documents with text of evaluation sets, by runs of 13 words (2005.14165, appendix C).

Words are sequences of letters, digits and underscores, in lower case, and single Chinese or Japanese
characters; all other characters separate them. A run is hashed to 64 bits, so an index takes 8 bytes per distinct run. Texts with fewer words
than a run have no run, and cannot be detected.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.ranges import Count, Size
from espalier.data.text import code_problems, documents
from espalier.data.text.document_filters import DocumentFilter
from espalier.data.text.documents import DataError

WORDS = 13
_CHARACTERS = r"\u3040-\u30ff\u3400-\u9fff"  # of scripts without spaces
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+")
# Part of the digest of a filter: raise it when the same texts have other runs.
VERSION = 2
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xFF51AFD7ED558CCD)


@functools.lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def runs(text: str, words: int = WORDS) -> np.ndarray:
    """Returns one uint64 hash per run of `words` words, in order; empty for a shorter text."""
    hashes = np.array([_hash(word) for word in _WORD.findall(text.lower())], np.uint64)
    count = max(len(hashes) - words + 1, 0)
    run_hashes = np.zeros(count, np.uint64)
    for i in range(words):  # a polynomial in the order of the words
        run_hashes = run_hashes * _MULTIPLIER + hashes[i : i + count]
    run_hashes ^= run_hashes >> np.uint64(33)
    run_hashes *= _MIX
    return run_hashes ^ (run_hashes >> np.uint64(29))


@dataclasses.dataclass(frozen=True)
class Index:
    """The runs of an evaluation set."""

    runs: np.ndarray  # uint64 hashes of the distinct runs, ascending
    words: int  # per run

    @classmethod
    def of(cls, texts: Iterable[str], words: int = WORDS) -> "Index":
        """Returns the index of texts; iterates over them once."""
        all_runs = [np.zeros(0, np.uint64), *(runs(text, words) for text in texts)]
        return cls(np.unique(np.concatenate(all_runs)), words)

    def overlap(self, text: str) -> int:
        """Returns how many of a text's runs occur in the set; repeated runs count each time."""
        own = runs(text, self.words)
        if not len(own) or not len(self.runs):
            return 0
        places = np.searchsorted(self.runs, own)
        places[places == len(self.runs)] = 0
        return int((self.runs[places] == own).sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap(DocumentFilter):
    """Drops documents that share a run of words with an evaluation set; use one filter per set.

    Raises:
      ProblemsError: HumanEval's package is not installed.
      DataError: the file or a key does not exist, or no text has a run (raised at the first document).
    """

    evaluation_set: str  # `humaneval` (its prompts and solutions), or a file of JSON lines
    # keys of the texts in that file, joined in this order; None for all keys that hold strings or
    # lists of strings
    text_keys: Sequence[str] | None = None
    label: str | None = None  # name of the count of dropped documents; default from the set's name
    words: Size = WORDS  # words per run
    most: Count = 0  # number of runs that a document may share

    def __post_init__(self):
        if self.words < 1 or self.most < 0:
            raise ValueError(
                f"Overlap: words = {self.words} must be at least 1, and most = {self.most} not negative."
            )

    @property
    def name(self) -> str:
        return self.label or f"overlap with {pathlib.Path(self.evaluation_set).name}"

    @functools.cached_property
    def index(self) -> Index:
        """The index of the evaluation set, which is read once."""
        index = Index.of(evaluation_texts(self.evaluation_set, self.text_keys), self.words)
        if not len(index.runs):
            raise DataError(
                f"{self.evaluation_set}: no text has {self.words} words in a row, so the filter would drop nothing. Lower "
                "Overlap.words"
            )
        return index

    def settings(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "words": self.words,
            "most": self.most,
            "runs": hashlib.sha256(self.index.runs.tobytes()).hexdigest(),
        }

    def __call__(self, document: Mapping[str, Any]) -> bool:
        return self.index.overlap(document["text"]) <= self.most


def evaluation_texts(name: str, text_keys: Sequence[str] | None = None) -> Iterator[str]:
    """Yields the texts of an evaluation set; see `Overlap` for arguments and errors."""
    if name == code_problems.HUMANEVAL:
        for problem in code_problems.load(name).problems.values():
            yield f"{problem.prompt}\n{problem.solution}"
        return
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f"{path}: the evaluation set does not exist. Set Overlap.evaluation_set to "
            f"{code_problems.HUMANEVAL!r} or to a file of JSON lines"
        )
    for number, record in documents.read_json_lines(path):
        keys = list(record) if text_keys is None else text_keys
        for key in keys:
            if key not in record:
                raise DataError(
                    f"{path}, line {number}: no key {key!r}; present are "
                    f"{', '.join(map(repr, record)) or 'none'}. Correct Overlap.text_keys"
                )
        yield "\n".join(part for key in keys for part in _strings(record[key]))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
