"""A source of packed rows of any size, whose index and tokens are calculated and never stored.

A real plan of a few thousand records is the first period. All later periods have records of the same lengths in rows of the
same form, and tokens of their own. Shape suffixes: N records, S segments, T tokens.
"""

import pathlib
from typing import Any, cast

import numpy as np

from espalier.data.cache.cache_files import Column
from espalier.data.cache.store import Cache, digest
from espalier.data.stream.plan import Plan, make_plan
from espalier.data.stream.rows import Source

VOCABULARY = 32_000
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Periodic:
    """An array of `size` values that repeats `first`, adding `stride` from one period to the next."""

    def __init__(self, first: np.ndarray, size: int, stride: int = 0):
        self._first, self._size, self._stride = first, size, stride

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            index = np.arange(*index.indices(self._size))
        period, place = np.divmod(index, len(self._first))
        return self._first[place] + period * self._stride

    def sum(self, dtype: Any = np.int64) -> int:
        """Returns the sum of whole periods of an array without a stride."""
        return int(self._first.sum(dtype=dtype)) * (self._size // len(self._first))


def tokens_at(index_T: np.ndarray) -> np.ndarray:
    """Returns the tokens at these indices, from 1 on: the upper bits of a product with the golden ratio."""
    mixed_T = (index_T.astype(np.uint64) * _GOLDEN) >> np.uint64(33)
    return (mixed_T % np.uint64(VOCABULARY - 1)).astype(np.int32) + 1


class _Tokens:
    """The values of `data.cache.cache_files.Column`, calculated."""

    def __init__(self, lengths: Periodic, starts: Periodic):
        self.lengths, self.starts = lengths, starts

    def gather(
        self, begins: np.ndarray, lengths: np.ndarray, out: np.ndarray, at: np.ndarray
    ) -> None:
        """See `Column.gather`."""
        lengths = lengths.astype(np.int64)
        before = np.cumsum(lengths) - lengths
        place_T = np.arange(int(lengths.sum()))
        index_T = place_T + np.repeat(begins - before, lengths)
        out[place_T + np.repeat(at - before, lengths)] = tokens_at(index_T)


def make(name: str, lengths_N: np.ndarray, *, row_length: int, tokens: int) -> Source:
    """Returns a source of at least `tokens` tokens.

    Args:
      name: of the source.
      lengths_N: tokens of the records of one period.
      row_length: tokens per row.
      tokens: the size, rounded up to whole periods.
    """
    plan = make_plan({"targets": lengths_N}, {"targets": row_length})
    periods = -(-tokens // plan.tokens())
    segments, records = len(plan.records), len(lengths_N)

    def repeat(first: np.ndarray, stride: int = 0) -> Any:
        return Periodic(first.astype(np.int64), periods * len(first), stride)

    whole = Plan(
        # One entry more than rows, which is the number of all segments.
        row_starts=cast(
            np.ndarray, Periodic(plan.row_starts[:-1], periods * plan.num_rows + 1, segments)
        ),
        records=repeat(plan.records, records),
        offsets=repeat(plan.offsets),
        lengths={"targets": repeat(plan.lengths["targets"])},
        row_lengths=plan.row_lengths,
        packing=plan.packing,
        long_documents=plan.long_documents,
        counts={key: count * periods for key, count in plan.counts.items()},
    )
    period_tokens = int(lengths_N.sum())
    column = _Tokens(
        repeat(lengths_N), repeat(np.cumsum(lengths_N) - lengths_N, stride=period_tokens)
    )
    content = digest([name, lengths_N.tolist(), periods])
    cache = Cache(
        directory=pathlib.Path("calculated"),
        fingerprint=content,
        content=content,
        columns={"targets": cast(Column, column)},
        manifest={
            "records": periods * records,
            "values": {"targets": periods * period_tokens},
            "text_bytes": {"targets": 0},
            "features": {"targets": VOCABULARY},
            "description": {},
        },
    )
    return Source(name, cache, whole)
