"""Near-duplicates of a corpus that is divided over processes: those that `dedup.near_duplicates` finds in one pass in memory.

Documents are numbered in the order of the corpus. Documents with sketches that agree in a band have the same key and are compared. Each
pair of similar documents and each copy is then known, which decides document by document what is a duplicate. `Search` does this
by files, which each step leaves for the next one.
"""

import dataclasses
import functools
import io
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from espalier.common.storage.result_folder import ResultFolder, together
from espalier.data.text.dedup import BANDS, SKETCH

_MULTIPLIERS = tuple(
    np.uint64(c) for c in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
)
_AT_ONCE = 1 << 20  # pairs that are Python objects at a time
_ROWS = 1 << 16  # sketches in memory at a time, of 1 KiB


def band_keys(sketches: np.ndarray) -> np.ndarray:
    """Returns one uint64 hash per band of each sketch, [BANDS, documents]: equal bands have equal keys.

    Args:
      sketches: uint64 [documents, SKETCH], of `dedup.sketch`.
    """
    bands = sketches.reshape(len(sketches), BANDS, SKETCH // BANDS)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for place in range(bands.shape[2]):
        keys = (keys ^ bands[:, :, place]) * _MULTIPLIERS[place % len(_MULTIPLIERS)]
        keys ^= keys >> np.uint64(32)
    return np.ascontiguousarray(keys.T)


def buckets(keys: np.ndarray) -> list[np.ndarray]:
    """Returns the places of each key that occurs more than once, ascending.

    Args:
      keys: uint64 [documents], of one band.
    """
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    return [places for places in np.split(order, ends) if len(places) > 1]


def pairs_of(sketches: np.ndarray, band: int, *, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs of similar documents of a bucket, and the pairs of copies.

    All buckets of all bands together return a pair once, for the first band that it shares. Of documents with equal sketches, all
    but the first are copies, which are in no pair: whatever becomes of the first, they are duplicates. The time is quadratic in
    the number of different sketches.

    Args:
      sketches: uint64 [documents, SKETCH], in the order of the corpus.
      band: whose keys are equal, perhaps by chance.
      threshold: least resemblance of a pair.

    Returns:
      int64 [pairs, 2], the places of a document and of an earlier one, and int64 [copies].
    """
    first: dict[bytes, int] = {}
    different = [i for i, row in enumerate(sketches) if first.setdefault(row.tobytes(), i) == i]
    places = np.array(different, np.int64)
    copies = np.setdiff1d(np.arange(len(sketches)), places, assume_unique=True)
    rows = sketches[places]
    found = [np.empty((0, 2), np.int64)]
    for number in range(1, len(rows)):
        equal = rows[:number] == rows[number]
        similar = np.flatnonzero(equal.mean(axis=1) >= threshold)
        shared = equal[similar].reshape(-1, BANDS, SKETCH // BANDS).all(axis=2)
        earlier = places[similar[shared[:, band] & ~shared[:, :band].any(axis=1)]]
        found.append(np.stack([np.full_like(earlier, places[number]), earlier], axis=1))
    return np.concatenate(found), copies if band == 0 else copies[:0]


def duplicates(pairs: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Returns the numbers of all duplicates, ascending: copies, and what is similar to an earlier document that is none.

    Args:
      pairs: int64 [pairs, 2], the numbers of a document and of an earlier one, of all buckets.
      copies: int64 [copies], of all buckets.
    """
    found = set(copies.tolist())
    # Sorted, so that it is known of an earlier document whether it is a duplicate.
    order = np.argsort(pairs[:, 0], kind="stable")
    for begin in range(0, len(order), _AT_ONCE):
        for later, earlier in pairs[order[begin : begin + _AT_ONCE]].tolist():
            if earlier not in found:
                found.add(later)
    return np.array(sorted(found), np.int64)


@dataclasses.dataclass(frozen=True)
class Search:
    """The search in a corpus of several files.

    Attributes:
      folder: of the results.
      files: number of files.
      parts: by which the keys of a band are divided, so that their documents fit into memory.
      threshold: least resemblance of duplicates.
    """

    folder: ResultFolder
    files: int
    parts: int
    threshold: float

    def put(self, file: int, sketches: np.ndarray) -> None:
        """Writes the sketches of a file's documents, uint64 [documents, SKETCH]."""
        self.folder.write(f"{file:05d}.keys", band_keys(sketches).tobytes())
        self.folder.write(f"{file:05d}.sketches", sketches.tobytes())

    def number(self, documents: Sequence[int]) -> None:
        """Writes the numbers of all documents, of which each file has so many."""
        self.folder.write_json("first.json", [0, *itertools.accumulate(documents)])

    @property
    def elements(self) -> list[tuple[int, int]]:
        """What is compared on its own: (band, part)."""
        return list(itertools.product(range(BANDS), range(self.parts)))

    def compare(self, element: tuple[int, int]) -> None:
        """Writes the similar pairs and the copies of one band, or of a part of its keys."""
        if self.folder.has(self._pairs_file(element)):
            return
        band, part = element
        keys, numbers = self._keys(band, part)
        pairs, copies = [np.empty((0, 2), np.int64)], [np.empty(0, np.int64)]
        for group in _grouped(buckets(keys)):
            wanted = np.sort(numbers[np.concatenate(group)])
            sketches = self._sketches(wanted)
            for places in group:
                own = numbers[places]
                rows = sketches[np.searchsorted(wanted, own)]
                near, same = pairs_of(rows, band, threshold=self.threshold)
                pairs.append(own[near])
                copies.append(own[same])
        file = io.BytesIO()
        np.savez(file, pairs=np.concatenate(pairs), copies=np.concatenate(copies))
        self.folder.write(self._pairs_file(element), file.getvalue())

    def decide(self) -> int:
        """Writes which documents are duplicates, and returns their number."""
        files = together(self.folder.read, map(self._pairs_file, self.elements))
        arrays = [np.load(io.BytesIO(file)) for file in files]
        found = duplicates(
            np.concatenate([each["pairs"] for each in arrays]),
            np.concatenate([each["copies"] for each in arrays]),
        )
        self.folder.write("duplicates", found.tobytes())
        self.folder.write_json("duplicates.json", np.searchsorted(found, self._first).tolist())
        return len(found)

    def duplicates_of(self, file: int) -> np.ndarray:
        """Returns the places of a file's duplicates among its documents, int64, ascending."""
        begin, end = self.folder.json("duplicates.json")[file : file + 2]
        numbers = np.frombuffer(self.folder.read("duplicates", 8 * begin, 8 * end), np.int64)
        return numbers - self._first[file]

    @functools.cached_property
    def _first(self) -> np.ndarray:
        """int64 [files + 1], the number of the first document of each file, and of all documents."""
        return np.array(self.folder.json("first.json"), np.int64)

    @staticmethod
    def _pairs_file(element: tuple[int, int]) -> str:
        return "pairs_{:02d}_{:05d}.npz".format(*element)

    def _keys(self, band: int, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the keys of a part of a band, uint64, and the numbers of their documents."""

        def of_file(file: int) -> tuple[np.ndarray, np.ndarray]:
            count = int(self._first[file + 1] - self._first[file])
            raw = self.folder.read(f"{file:05d}.keys", 8 * band * count, 8 * (band + 1) * count)
            keys = np.frombuffer(raw, np.uint64)
            places = np.flatnonzero(keys % np.uint64(self.parts) == part)
            return keys[places], places + self._first[file]

        found = together(of_file, np.flatnonzero(np.diff(self._first)).tolist())
        keys, numbers = zip(*found, strict=True) if found else ((), ())
        empty = np.empty(0, np.int64)
        return np.concatenate([empty.view(np.uint64), *keys]), np.concatenate([empty, *numbers])

    def _sketches(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the sketches of documents, which ascend, uint64 [documents, SKETCH]."""
        sketches = np.empty((len(numbers), SKETCH), np.uint64)
        owners = np.searchsorted(self._first, numbers, side="right") - 1
        size = sketches.itemsize * SKETCH

        def read(places: np.ndarray) -> None:  # of documents that follow each other in a file
            owner = int(owners[places[0]])
            begin = int(numbers[places[0]] - self._first[owner])
            ends = (size * begin, size * (begin + len(places)))
            raw = self.folder.read(f"{owner:05d}.sketches", *ends)
            sketches[places] = np.frombuffer(raw, np.uint64).reshape(-1, SKETCH)

        breaks = (np.diff(owners) != 0) | (np.diff(numbers) != 1)
        together(read, np.split(np.arange(len(numbers)), np.flatnonzero(breaks) + 1))
        return sketches


def _grouped(found: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yields buckets together, about `_ROWS` documents at a time."""
    group: list[np.ndarray] = []
    size = 0
    for bucket in found:
        group.append(bucket)
        size += len(bucket)
        if size >= _ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group
