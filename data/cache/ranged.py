"""Arrays in files of a folder or an object store, read by ranges: only the blocks that are asked for, each verified.

folder = BlockFolder("gs://BUCKET/plans/1234", of=digest)    # has blocks.json, see data/cache/blocks.py
array = RangedArray(folder, ["00000.rows", "00001.rows"], np.dtype("<u4"))   # as if concatenated
array[[5, 10**9]], array[7:1000], len(array)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from espalier.data.cache import blocks
from espalier.data.cache.block_folder import BlockFolder

_WINDOW = 512  # blocks that one call holds at a time


class RangedArray:
    """The values of one or several files, as if they were concatenated; see the module.

    Attributes:
      bounds: int64 [files + 1], the index of the first value of each file, and the total.
      folder, files: where they are.
    """

    ndim = 1

    def __init__(self, folder: BlockFolder, names: Sequence[str], dtype: np.dtype):
        """Raises CacheCorruptError if `blocks.json` of the folder lacks one of the files."""
        self.dtype = np.dtype(dtype)
        self.folder, self.files = folder, tuple(map(folder.file, names))
        self._per_block = blocks.BYTES // self.dtype.itemsize
        assert self._per_block * self.dtype.itemsize == blocks.BYTES
        counts = [file.size // self.dtype.itemsize for file in self.files]
        self.bounds = np.cumsum([0, *counts], dtype=np.int64)
        self._first = np.array([file.first for file in self.files], np.int64)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Reads all values."""
        if copy is False:
            raise ValueError("The values are in files: they are copied.")
        return self[:] if dtype is None else self[:].astype(dtype)

    def __getitem__(self, index: Any) -> Any:
        """Returns the values at an index, a slice, or an array of indices.

        Raises:
          IndexError: there is no such value.
        """
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step != 1:
                return self._take(np.arange(begin, end, step, dtype=np.int64))
            out = np.empty(max(0, end - begin), self.dtype)
            cuts = self.bounds[(self.bounds > begin) & (self.bounds < end)]
            begins = np.unique(np.concatenate([[begin], cuts])).astype(np.int64)
            lengths = np.diff(np.append(begins, max(begin, end)))
            self.gather(begins, lengths, out, begins - begin)
            return out
        indices = np.asarray(index)
        if indices.dtype == bool:
            indices = np.flatnonzero(indices)
        flat = indices.reshape(-1).astype(np.int64)
        flat = np.where(flat < 0, flat + len(self), flat)
        if len(flat) and not (flat.min() >= 0 and flat.max() < len(self)):
            raise IndexError(f"An index is outside of an array of {len(self):,} values.")
        out = self._take(flat).reshape(indices.shape)
        return out if indices.ndim else out[()]

    def gather(
        self, begins: np.ndarray, lengths: np.ndarray, out: np.ndarray, at: np.ndarray
    ) -> None:
        """Copies values [begins, begins + lengths) to `out` from index `at` on, for every range.

        Each range must lie in one file; `out` is flat.

        Raises:
          CacheCorruptError: bytes are damaged or missing.
          CacheChangedError: there are other files now.
          StoreError: the store does not answer.
        """
        begins, lengths, at = (np.asarray(array, np.int64) for array in (begins, lengths, at))
        # Pieces, one for each block of each range.
        used = lengths > 0
        begins, lengths, at = begins[used], lengths[used], at[used]
        file = np.searchsorted(self.bounds, begins, side="right") - 1
        inside = begins - self.bounds[file]
        first = inside // self._per_block
        count = (inside + lengths - 1) // self._per_block - first + 1
        piece = np.repeat(np.arange(len(begins)), count)
        block = first[piece] + np.arange(len(piece)) - np.repeat(np.cumsum(count) - count, count)
        start = np.maximum(inside[piece], block * self._per_block)
        stop = np.minimum((inside + lengths)[piece], (block + 1) * self._per_block)
        to = at[piece] + start - inside[piece]
        start, stop = start - block * self._per_block, stop - block * self._per_block
        file = file[piece]
        for part, key, file_of_key in self._windows(file, block):
            found = self.folder.read(key, file_of_key, self.files)
            views = [np.frombuffer(data, self.dtype) for data in found]
            place = np.searchsorted(key, self._first[file[part]] + block[part])
            pieces = (array.tolist() for array in (place, start[part], stop[part], to[part]))
            for view, begin, end, target in zip(*pieces, strict=True):
                out[target : target + end - begin] = views[view][begin:end]

    def _take(self, index: np.ndarray) -> np.ndarray:
        """Returns the values at indices that are valid."""
        out = np.empty(len(index), self.dtype)
        file = np.searchsorted(self.bounds, index, side="right") - 1
        block, inside = np.divmod(index - self.bounds[file], self._per_block)
        for part, key, file_of_key in self._windows(file, block):
            found = self.folder.read(key, file_of_key, self.files)
            place = np.searchsorted(key, self._first[file[part]] + block[part])
            order = np.argsort(place, kind="stable")
            ends = np.searchsorted(place[order], np.arange(len(key)), side="right")
            for data, here in zip(found, np.split(order, ends[:-1]), strict=True):
                out[part[here]] = np.frombuffer(data, self.dtype)[inside[part[here]]]
        return out

    def _windows(
        self, file: np.ndarray, block: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (positions in `block`, keys of their blocks in order, number of each key's file), few blocks at a time."""
        keys = self._first[file] + block
        every, first_use, inverse = np.unique(keys, return_index=True, return_inverse=True)
        for begin in range(0, len(every), _WINDOW):
            window = slice(begin, begin + _WINDOW)
            if len(every) <= _WINDOW:
                part = np.arange(len(keys))
            else:
                part = np.flatnonzero((inverse >= begin) & (inverse < begin + _WINDOW))
            yield part, every[window], file[first_use[window]]
