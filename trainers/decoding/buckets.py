"""Groups rows of unequal length into few shapes, for little padding and few compilations."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

SMALLEST = 16
# Enough rows for batches of similar length, and few enough to lose when a process is killed.
BATCHES_SORTED = 64

_T = TypeVar("_T")


def bucket_length(length: int, *, limit: int | None = None) -> int:
    """Returns the smallest of 16, 24, 32, 48, 64, 96, ... that is at least `length`, but at most `limit`.

    At most a third of a row of at least 16 tokens is padding, and each doubling of the length adds two shapes.
    """
    bucket = SMALLEST
    while bucket < length:
        # Alternate between powers of two and 1.5 times a power of two.
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket if limit is None else min(bucket, limit)


def bucket_below(length: int) -> int:
    """Returns the largest of 1, 2, 4, 8 and the lengths of `bucket_length` that is at most `length`."""
    if length < SMALLEST:
        return 1 << (length.bit_length() - 1)
    if (bucket := bucket_length(length)) == length:
        return length
    return bucket * 3 // 4 if bucket & (bucket - 1) == 0 else bucket * 2 // 3


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Returns batches of row indices with similar lengths, the longest first, so memory errors come early.

    The rows of BATCHES_SORTED batches are sorted at a time, so that the first rows of a long file are
    finished long before the last.
    """
    batches = []
    together = BATCHES_SORTED * batch_size
    for first in range(0, len(lengths), together):
        rows = range(first, min(first + together, len(lengths)))
        order = sorted(rows, key=lambda i: -lengths[i])
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


def padded(
    rows: Sequence[Sequence[int]], batch_size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [batch_size, length], padded with zeros, and lengths [batch_size], 1 for absent rows; int32."""
    tokens_BT = np.zeros((batch_size, length), np.int32)
    lengths_B = np.ones(batch_size, np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)], lengths_B[b] = row, len(row)
    return tokens_BT, lengths_B


def in_order(pairs: Iterable[tuple[int, _T]]) -> Iterator[_T]:
    """Yields values in the order of their indices, from 0, each as soon as all earlier ones are there."""
    waiting: dict[int, _T] = {}
    after = 0
    for index, value in pairs:
        waiting[index] = value
        while after in waiting:
            yield waiting.pop(after)
            after += 1
