"""Ragged, memory-mapped columns: the values of one feature of all records of a cache."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np


def feature_dtype(kind: int | str) -> np.dtype:
    """Returns the stored dtype of a feature: a vocabulary size for tokens, 'text' or 'float32'.

    Raises:
        ValueError: any other kind.
    """
    if kind == "text":
        return np.dtype("u1")
    if kind == "float32":
        return np.dtype("<f4")
    if not isinstance(kind, int) or not 0 < kind <= 2**32:
        raise ValueError(f"The feature is {kind!r}; give a vocabulary size, 'text' or 'float32'.")
    return np.dtype("<u2") if kind <= 2**16 else np.dtype("<u4")


@dataclasses.dataclass(frozen=True)
class Column:
    """The concatenated values of all records, as one array per shard of the cache."""

    shards: list[np.ndarray]  # the values of each shard, memory-mapped
    # int64 [shards + 1], the index of the first value of each shard, and the total
    bounds: np.ndarray
    lengths: np.ndarray  # uint32 [records], the number of values of each record
    starts: np.ndarray  # int64 [records], the index of the first value of each record

    @classmethod
    def open(cls, stems: Sequence[pathlib.Path], dtype: np.dtype) -> "Column":
        """Maps `<stem>.bin` and reads `<stem>.len` for every stem."""
        shards = [_map(stem.with_name(stem.name + ".bin"), dtype) for stem in stems]
        lengths = np.concatenate(
            [np.fromfile(stem.with_name(stem.name + ".len"), "<u4") for stem in stems]
        )
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        bounds = np.cumsum([0] + [len(shard) for shard in shards], dtype=np.int64)
        return cls(shards, bounds, lengths, starts)

    def gather(
        self, begins: np.ndarray, lengths: np.ndarray, out: np.ndarray, at: np.ndarray
    ) -> None:
        """Copies values [begins, begins + lengths) to `out` from index `at` on, for every range.

        Each range must lie in one shard; `out` is flat. Slices are copied in a Python loop; from about
        a hundred values per slice on, copying dominates the time.
        """
        # An empty range may begin after the last value, which lies in no shard.
        nonempty = lengths > 0
        begins, lengths, at = begins[nonempty], lengths[nonempty], at[nonempty]
        shard_of = np.searchsorted(self.bounds, begins, side="right") - 1
        begins = begins - self.bounds[shard_of]
        shards = self.shards
        for shard, begin, length, to in zip(
            shard_of.tolist(), begins.tolist(), lengths.tolist(), at.tolist(), strict=True
        ):
            out[to : to + length] = shards[shard][begin : begin + length]

    def values(self, record: int) -> np.ndarray:
        """Returns all values of one record."""
        out = np.empty(int(self.lengths[record]), self.shards[0].dtype)
        if len(out):
            self.gather(self.starts[[record]], self.lengths[[record]], out, np.zeros(1, np.int64))
        return out

    def text(self, record: int) -> str:
        """Returns the string of one record of a 'text' feature."""
        return self.values(record).tobytes().decode("utf-8", "replace")


def _map(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped. Slicing an ndarray view is twice as fast as slicing a memmap.
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
