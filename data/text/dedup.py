"""Detects near-duplicate documents, and validation text that also occurs in training documents.

A document is represented by the set of its shingles: one 64-bit hash per run of `SHINGLE` bytes,
with white space collapsed. Two quantities are estimated from these sets.

*Resemblance* (Broder, 1997): the share of shingles that two documents have in common, by MinHash.
The `k`-th hash function is a rotation of one hash: its minimum is the smallest (h - k * 2^64 /
SKETCH) mod 2^64, which is the first hash at or above k * 2^64 / SKETCH. A sketch therefore needs
one sort, and one binary search per entry. Each entry of two sketches is equal with probability
exactly their resemblance. Banding selects the pairs to compare.

*Containment*: the share of a validation document's shingles that occur in training documents.
Shingles are sampled by value (hashes below a bound), so the samples of all documents are
comparable. Shingles that occur in many training documents are boilerplate and do not count as
leakage.
"""

import re
from collections.abc import Sequence

import numpy as np

SHINGLE = 16  # bytes: about three words, five ideographs
SKETCH = 128
BANDS = 32  # of 4 entries: a pair with resemblance 0.8 is compared with probability 1 - 5e-8
SAMPLE_SHIFT = 4  # one shingle in 16 is sampled for containment
BOILERPLATE = 8  # shingles in at least this many training documents are boilerplate

_MIX = tuple(np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xFF51AFD7ED558CCD))
_STARTS = (np.arange(SKETCH, dtype=np.uint64)) << np.uint64(64 - SKETCH.bit_length() + 1)


def shingles(text: str) -> np.ndarray:
    """Returns one uint64 hash per byte offset of a text; a shorter text than a shingle has one."""
    raw = re.sub(rb"\s+", b" ", text.encode("utf-8", "surrogatepass")).strip()
    raw = raw.ljust(SHINGLE, b"\0")
    octets = np.lib.stride_tricks.sliding_window_view(np.frombuffer(raw, np.uint8), 8)
    words = np.ascontiguousarray(octets).view(np.uint64)[:, 0]
    hashes = words[:-8] * _MIX[0] ^ (words[8:] + _MIX[1]) * _MIX[1]
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MIX[2]
    return hashes ^ (hashes >> np.uint64(29))


def sketch(hashes: np.ndarray) -> np.ndarray:
    """Returns the `SKETCH` MinHash values of a set of hashes."""
    ordered = np.sort(hashes)
    first = np.searchsorted(ordered, _STARTS)
    return ordered[first % len(ordered)]  # past the largest hash, around to the smallest


def near_duplicates(texts: Sequence[str], *, threshold: float = 0.8) -> list[int | None]:
    """Returns, for each text, the index of an earlier text that it duplicates, or None.

    Only texts that are not duplicates themselves are candidates. A duplicate has a resemblance of at
    least `threshold`, estimated from `SKETCH` values; at 0.8 the standard error is 0.035.
    """
    buckets: dict[tuple[int, bytes], list[int]] = {}
    sketches = np.empty((len(texts), SKETCH), np.uint64)
    duplicate_of: list[int | None] = []
    for index, text in enumerate(texts):
        sketches[index] = sketch(shingles(text))
        keys = [(band, row.tobytes()) for band, row in enumerate(np.split(sketches[index], BANDS))]
        candidates = sorted({other for key in keys for other in buckets.get(key, ())})
        resemblance = (sketches[candidates] == sketches[index]).mean(axis=1)
        if candidates and resemblance.max() >= threshold:
            duplicate_of.append(candidates[int(resemblance.argmax())])
            continue
        duplicate_of.append(None)
        for key in keys:
            buckets.setdefault(key, []).append(index)
    return duplicate_of


def sample(text: str) -> np.ndarray:
    """Returns the distinct shingles with hashes below a fixed bound, equal for all documents."""
    hashes = shingles(text)
    return np.unique(hashes[hashes < np.uint64(1 << (64 - SAMPLE_SHIFT))])


def containment(samples: Sequence[np.ndarray], training: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the share of each document's shingles that occur in training documents.

    Boilerplate is not counted. Both arguments hold the `sample` of each document.
    """
    if not training:
        return np.zeros(len(samples))
    seen, documents = np.unique(np.concatenate(training), return_counts=True)
    boilerplate = seen[documents >= BOILERPLATE]
    shares = np.zeros(len(samples))
    for index, own in enumerate(samples):
        own = np.setdiff1d(own, boilerplate, assume_unique=True)
        shares[index] = np.isin(own, seen, assume_unique=True).mean() if len(own) else 0.0
    return shares
