"""Rows of unequal length in few shapes, so that little is computed in vain and seldom compiled."""

from collections.abc import Mapping, Sequence
from typing import Any

SMALLEST = 16


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
    """Indices in batches of similar length; the longest first, so that they fail at once if at all."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def longest_row(params: Mapping[str, Any]) -> int | None:
    """Positions a model has learned; None where positions are computed and any length will do."""
    table = params.get("positions")
    return None if table is None else table["embedding"].shape[0]
