"""Rows of unequal length in few shapes, so that little is computed in vain and seldom compiled."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

SMALLEST = 16
# Enough rows of any length for batches of similar length, and few to be lost with a process.
BATCHES_SORTED = 64

_T = TypeVar("_T")


def bucket_length(length: int, *, limit: int | None = None) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `length`, cut at `limit`.

    At most a third of a row is padding, and there are two shapes for every doubling of the length.
    """
    bucket = SMALLEST
    while bucket < length:
        # Between powers of two lies one and a half of the lower one.
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket if limit is None else min(bucket, limit)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length; the longest first, so that they fail at once if at all.

    The rows of BATCHES_SORTED batches are sorted at a time, so that the first rows of a long file are
    done long before the last.
    """
    batches = []
    together = BATCHES_SORTED * batch_size
    for first in range(0, len(lengths), together):
        rows = range(first, min(first + together, len(lengths)))
        order = sorted(rows, key=lambda i: -lengths[i])
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


def in_order(pairs: Iterable[tuple[int, _T]]) -> Iterator[_T]:
    """Values by index from 0, each as soon as it and all before it have come."""
    waiting: dict[int, _T] = {}
    after = 0
    for index, value in pairs:
        waiting[index] = value
        while after in waiting:
            yield waiting.pop(after)
            after += 1
