"""Arrays in files of a folder or an object store, read by ranges: only the blocks that are asked for, each verified.

    folder = ranged.Folder("gs://BUCKET/plans/1234", of=digest)    # has blocks.json, see data/cache/blocks.py
    array = folder.array(["00000.rows", "00001.rows"], np.dtype("<u4"))   # as if concatenated
    array[[5, 10**9]], array[7:1000], len(array)

All arrays of a process share two caches of bounded size: of blocks, and of tables of checksums, which random reads need again
much sooner. All blocks that a call needs are asked for at once, those
that follow each other in a file by one request. TensorStore reads: a request costs it 0.2 ms of processor, and fsspec's
clients 1.3 ms (64 KiB, 128 at once, 50 ms latency). It tries failed requests again, with growing pauses.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.common.storage import paths
from espalier.data.cache import blocks
from espalier.data.cache.cache_files import CacheCorruptError

MEMORY = 64_000_000  # bytes of blocks that a process keeps
TABLES = 192_000_000  # bytes of tables that it keeps: of 1.5 TB
_AT_ONCE = 128  # requests; at 50 ms each, 160 MB/s
_RUN = 16  # blocks of one request at most
_WINDOW = 512  # blocks that one call holds at a time
_RETRIES = {"max_retries": 12, "initial_delay": "0.1s", "max_delay": "16s"}
_TRIES = 4  # of a request that TensorStore gives up, or that brings damaged bytes
_PAUSE_SECONDS = 0.5  # doubled with every try
_FOLDER_BITS = 40  # of the number of a block within its folder


class CacheChangedError(ValueError):
    """A cache was replaced or deleted while it was read."""


class BlockCache:
    """The blocks that were read last, by key, up to a number of bytes; and the requests that are under way.

    Attributes:
      size: bytes of the blocks.
      lock: held to look and to ask for what is not there, so that it is asked for once.
    """

    def __init__(self, memory: int):
        self.memory, self.size, self.lock = memory, 0, threading.RLock()
        self._kept: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._pending: dict[int, _Request] = {}

    def get(self, key: int) -> "bytes | _Request | None":
        """Returns a block, or the request that brings it, or None."""
        block = self._kept.get(key)
        if block is None:
            return self._pending.get(key)
        self._kept.move_to_end(key)
        return block

    def expect(self, request: "_Request") -> None:
        """Notes that a request brings its blocks."""
        self._pending.update(dict.fromkeys(request.keys, request))

    def arrived(self, request: "_Request", brought: Sequence[bytes]) -> None:
        """Keeps the blocks of a request; without any, forgets the request."""
        with self.lock:
            for key in request.keys:
                if self._pending.get(key) is request:
                    del self._pending[key]
            for key, block in zip(request.keys, brought, strict=False):
                if key not in self._kept:
                    self._kept[key] = block
                    self.size += len(block)
            while self.size > self.memory and self._kept:
                self.size -= len(self._kept.popitem(last=False)[1])


@functools.cache
def shared_caches() -> tuple[BlockCache, BlockCache]:
    """Returns the caches of this process, of blocks and of tables."""
    return BlockCache(MEMORY), BlockCache(TABLES)


_numbers = itertools.count(1)


class Folder:
    """Files with checksums of blocks, below a folder of this machine or an address.

    Attributes:
      place: the folder or address.
    """

    def __init__(
        self,
        place: str | os.PathLike,
        *,
        of: str,
        caches: tuple[BlockCache, BlockCache] | None = None,
    ):
        """Reads `blocks.json`, and nothing else.

        Raises:
          FileNotFoundError: there is none.
          CacheCorruptError: it is damaged, or not `of` these files.
          StoreError: the store refuses, or cannot be reached.
        """
        self.place = os.fspath(place)
        self._index = paths.read(paths.join(self.place, blocks.INDEX))
        self._groups = blocks.parse_index(self._index, self.place, of=of)
        self._blocks, self._tables = caches or shared_caches()
        self._base = next(_numbers) << _FOLDER_BITS
        self._files: dict[str, _File] = {}
        count = 0
        for group in self._groups:
            table_key, skip = self._base + count, 0
            count += 1
            for name, size in group.files.items():
                blocks_here = blocks.number(size)
                self._files[name] = _File(
                    name, size, self._base + count, blocks_here, group, table_key, skip
                )
                count += blocks_here
                skip += blocks.table_bytes(name, size)
        self._store_lock = threading.Lock()
        self._store: Any = None

    def array(self, names: Sequence[str], dtype: np.dtype) -> "RangedArray":
        """Returns the values of files as one array.

        Raises:
          CacheCorruptError: `blocks.json` lacks a file.
        """
        for name in names:
            if name not in self._files:
                raise CacheCorruptError(
                    f"{paths.join(self.place, blocks.INDEX)} has no checksums of {name}."
                )
        return RangedArray(self, [self._files[name] for name in names], dtype)

    def sums(self, array: "RangedArray", file: int, block: np.ndarray) -> np.ndarray:
        """Returns the sums of lengths before blocks of a file of lengths, int64; see data/cache/blocks.py."""
        entry = array.files[file]
        begin = entry.skip + entry.blocks * blocks.SUM
        return np.frombuffer(self._table(entry), "<i8", entry.blocks, begin)[block]

    def read(self, keys: np.ndarray, file_of: np.ndarray, files: Sequence["_File"]) -> list[bytes]:
        """Returns verified blocks, by keys in order and without repeats, each of the file of that number in `files`."""
        listed = keys.tolist()
        with self._blocks.lock:
            found = {key: self._blocks.get(key) for key in listed}
            missing = np.array([part is None for part in found.values()], bool)
            for request in self._requests(keys[missing], file_of[missing], files):
                found.update(dict.fromkeys(request.keys, request))
        return [
            part if isinstance(part, bytes) else part.blocks()[key - part.keys.start]
            for key, part in found.items()
            if part is not None
        ]

    def _requests(self, keys, file_of, files) -> list["_Request"]:
        """Starts to read blocks that are not there."""
        if not len(keys):
            return []
        apart = (np.diff(keys) != 1) | (np.diff(file_of) != 0)
        begins = np.concatenate([[0], np.flatnonzero(apart) + 1])
        ends = np.append(begins[1:], len(keys))
        # The tables first: they are needed as soon as a block has come.
        for number in np.unique(file_of).tolist():
            self._table_request(files[number])
        out = []
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            entry = files[int(file_of[begin])]
            for first in range(begin, end, _RUN):
                last = min(end, first + _RUN) - 1
                run = range(int(keys[first]), int(keys[last]) + 1)
                start = (run.start - entry.first) * blocks.BYTES
                stop = min(entry.size, start + len(run) * blocks.BYTES)
                out.append(_Request(self, self._blocks, entry.name, start, stop, run, entry))
        return out

    def _table_request(self, entry: "_File") -> "bytes | _Request":
        key = entry.table_key
        with self._tables.lock:
            found = self._tables.get(key)
            if found is None:
                size = sum(map(blocks.table_bytes, *zip(*entry.group.files.items(), strict=True)))
                table, keys = entry.group.table, range(key, key + 1)
                found = _Request(self, self._tables, table, 0, size, keys, entry)
        return found

    def _table(self, entry: "_File") -> bytes:
        """Returns the verified table of the group of a file."""
        found = self._table_request(entry)
        return found if isinstance(found, bytes) else found.blocks()[0]

    def finish(self, request: "_Request") -> list[bytes]:
        """Returns the verified blocks of a request, or its whole table.

        Raises:
          CacheCorruptError: bytes are damaged or missing.
          CacheChangedError: there is another cache now.
          StoreError: the store does not answer.
        """
        try:
            for again in itertools.count():
                data, damaged = request.result(last=again == _TRIES - 1), None
                if data is not None:
                    parts, damaged = self._verified(request, data)
                    if damaged is None:
                        request.cache.arrived(request, parts)
                        return parts
                    if again:  # else perhaps on its way
                        raise self._damage(
                            request,
                            f"the {len(parts[-1]):,} bytes from byte {damaged:,} on do not match their checksum",
                        )
                time.sleep(_PAUSE_SECONDS * 2**again)
                request.start()
            raise AssertionError
        except BaseException:
            request.cache.arrived(request, ())
            raise

    def _verified(self, request: "_Request", data: bytes) -> tuple[list[bytes], int | None]:
        """Returns the blocks of an answer up to one that is damaged, and that one's place in the file."""
        entry = request.entry
        if request.keys.start == entry.table_key:
            right = hashlib.sha256(data).hexdigest() == entry.group.sha256
            return [data], None if right else 0
        table, parts = self._table(entry), []
        for place in range(0, len(data), blocks.BYTES):
            parts.append(data[place : place + blocks.BYTES])
            at = entry.skip + (request.begin + place) // blocks.BYTES * blocks.SUM
            if blocks.checksum(parts[-1]) != table[at : at + blocks.SUM]:
                return parts, request.begin + place
        return parts, None

    def _damage(self, request: "_Request", what: str) -> ValueError:
        """Returns the error of bytes that are not those that the checksums are of."""
        try:
            now = paths.read(paths.join(self.place, blocks.INDEX))
        except FileNotFoundError:
            now = b""
        if now != self._index:
            return CacheChangedError(
                f"{self.place} was {'replaced' if now else 'deleted'} while it was read. Start again, and let one process "
                "write there while no other reads."
            )
        return CacheCorruptError(
            f"{paths.join(self.place, request.name)}: {what}. Write this object again from a copy, or delete the folder: a "
            "cache is built again by `espalier prepare cache --replace`."
        )

    def open_store(self) -> Any:
        """Returns TensorStore's view of the folder."""
        with self._store_lock:
            if self._store is None:
                import tensorstore

                spec = paths.kvstore(self.place)
                kind = {"file": None, "s3": "s3"}.get(spec["driver"], "gcs")
                if kind is not None:
                    spec[f"{kind}_request_retries"] = _RETRIES
                    spec[f"{kind}_request_concurrency"] = {"limit": _AT_ONCE}
                with paths.reporting(self.place):
                    self._store = tensorstore.KvStore.open(spec).result()
            return self._store


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of a folder: its blocks have the keys from `first` on, and its part of the table begins at `skip`."""

    name: str
    size: int
    first: int
    blocks: int
    group: blocks.Group
    table_key: int
    skip: int


class _Request:
    """A request for a range of a file, which any thread finishes that needs it."""

    def __init__(
        self,
        folder: Folder,
        cache: BlockCache,
        name: str,
        begin: int,
        end: int,
        keys: range,
        entry: _File,
    ):
        self.cache, self.entry, self.keys = cache, entry, keys
        self.name, self.begin, self.end = name, begin, end
        self._folder, self._lock = folder, threading.Lock()
        self._blocks: list[bytes] | None = None
        self.start()
        cache.expect(self)

    def start(self) -> None:
        store = self._folder.open_store()
        self._future = store.read(self.name, byte_range=slice(self.begin, self.end))

    def blocks(self) -> list[bytes]:
        """Waits for the blocks; raises as `Folder.finish`."""
        with self._lock:
            if self._blocks is None:
                self._blocks = self._folder.finish(self)
            return self._blocks

    def result(self, *, last: bool) -> bytes | None:
        """Returns the bytes; None if the request failed and is to be tried again, unless it was the `last` time."""
        address = paths.join(self._folder.place, self.name)
        try:
            with paths.reporting(address):
                found = self._future.result()
        except paths.StoreError as error:
            if "OUT_OF_RANGE" in str(error):
                raise self._folder._damage(self, f"it ends before byte {self.end:,}") from None
            if last:
                raise
            return None
        if found.state != "value":
            raise self._folder._damage(self, "it is missing")
        if len(found.value) != self.end - self.begin:
            raise self._folder._damage(self, f"it ends before byte {self.end:,}")
        return found.value


class RangedArray:
    """The values of one or several files, as if they were concatenated; see the module.

    Attributes:
      bounds: int64 [files + 1], the index of the first value of each file, and the total.
      files: the files.
    """

    ndim = 1

    def __init__(self, folder: Folder, files: Sequence[_File], dtype: np.dtype):
        self.dtype = np.dtype(dtype)
        self._folder, self.files = folder, tuple(files)
        self._per_block = blocks.BYTES // self.dtype.itemsize
        assert self._per_block * self.dtype.itemsize == blocks.BYTES
        counts = [file.size // self.dtype.itemsize for file in files]
        self.bounds = np.cumsum([0, *counts], dtype=np.int64)
        self._first = np.array([file.first for file in files], np.int64)

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
            found = self._folder.read(key, file_of_key, self.files)
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
            found = self._folder.read(key, file_of_key, self.files)
            place = np.searchsorted(key, self._first[file[part]] + block[part])
            order = np.argsort(place, kind="stable")
            ends = np.searchsorted(place[order], np.arange(len(key)), side="right")
            for data, here in zip(found, np.split(order, ends[:-1]), strict=True):
                out[part[here]] = np.frombuffer(data, self.dtype)[inside[part[here]]]
        return out

    def _windows(self, file: np.ndarray, block: np.ndarray):
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
