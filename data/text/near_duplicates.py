"""Near-duplicates of a corpus that is divided over processes: those that `dedup.near_duplicates` finds in one pass in memory.

Documents are numbered in the order of the corpus. Those whose sketches agree in a band are compared: they have the same key. Each
pair of similar documents and each copy is then known, which decides document by document what is a duplicate.
"""

import numpy as np

from espalier.data.text.dedup import BANDS, SKETCH

_MULTIPLIERS = tuple(
    np.uint64(c) for c in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
)


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
    """Returns the similar pairs of documents of a bucket, and those that are copies.

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
    for later, earlier in pairs[np.argsort(pairs[:, 0], kind="stable")].tolist():
        if earlier not in found:
            found.add(later)
    return np.array(sorted(found), np.int64)
