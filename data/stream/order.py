"""Stateless shuffling: computes which plan row is read at any position of a source.

A position counts the rows of one source read since step 0. `divmod(position, rows)` gives the
epoch and the place in the epoch. A keyed bijection of [0, rows) maps the place to a row. Nothing is
stored, so every position costs the same, and every epoch visits every row exactly once.
"""

import functools
import hashlib
import json

import numpy as np

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF


def hash64(*parts: str | int) -> int:
    """Returns a 64-bit hash of strings and integers, equal on every machine and in every process."""
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """Applies the finaliser of splitmix64: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=4096)
def _round_keys(key: int) -> tuple[np.uint64, ...]:
    words = np.array([(key + i * _GOLDEN) & _WORD for i in range(1, _ROUNDS + 1)], np.uint64)
    return tuple(_mix(words))


def permute(x: np.ndarray, size: int, key: int) -> np.ndarray:
    """Maps each x in [0, size) through a permutation of [0, size) that depends on `key`.

    A balanced Feistel network permutes the smallest domain of an even number of bits that contains
    [0, size). Results outside the range are encrypted again until they are inside (cycle walking),
    so the map is a bijection. The domain has at most four times the size of the range.

    The key has 64 bits; the result is int64, of the shape of `x`.
    """
    half = np.uint64((max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = _round_keys(key)

    def encrypt(value: np.ndarray) -> np.ndarray:
        left, right = value >> half, value & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        return (left << half) | right

    out = encrypt(np.asarray(x, np.uint64))
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = encrypt(out[outside])
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def evaluation_rows(places: np.ndarray, rows: int, name: str) -> np.ndarray:
    """Returns the row at each place of one pass over `rows` rows in a fixed order; -1 past the end."""
    out = np.full_like(places, -1)
    inside = places < rows
    out[inside] = permute(places[inside], rows, hash64("evaluation", name))
    return out


def shuffled_rows(
    positions: np.ndarray, rows: int, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (epoch, plan row) at each position of source `name` with `rows` rows per epoch."""
    epochs, places = np.divmod(positions, rows)
    out = np.empty_like(places)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        out[in_epoch] = permute(places[in_epoch], rows, hash64(seed, name, int(epoch)))
    return epochs, out
