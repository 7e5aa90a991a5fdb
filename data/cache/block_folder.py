"""Reads blocks of files of a folder or an object store, each verified; for arrays see data/cache/ranged.py.

All folders of a process share two caches of bounded size: of blocks, and of tables of checksums, which random reads need again
much sooner. All blocks that a call needs are asked for at once, those that follow each other in a file by one request.
TensorStore reads: a request costs it 0.2 ms of processor, and fsspec's clients 1.3 ms (64 KiB, 128 at once, 50 ms latency). It
tries failed requests again, with growing pauses.
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


@dataclasses.dataclass(frozen=True)
class BlockFile:
    """A file of a folder: its blocks have the keys from `first` on, and its part of the table begins at `skip`."""

    name: str
    size: int
    first: int
    count: int
    group: blocks.Group
    table_key: int
    skip: int


class BlockFolder:
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
        self._files: dict[str, BlockFile] = {}
        count = 0
        for group in self._groups:
            table_key, skip = self._base + count, 0
            count += 1
            for name, size in group.files.items():
                blocks_here = blocks.number(size)
                self._files[name] = BlockFile(
                    name, size, self._base + count, blocks_here, group, table_key, skip
                )
                count += blocks_here
                skip += blocks.table_bytes(name, size)
        self._store_lock = threading.Lock()
        self._store: Any = None

    def file(self, name: str) -> BlockFile:
        """Returns a file; raises CacheCorruptError if `blocks.json` lacks it."""
        if name not in self._files:
            raise CacheCorruptError(
                f"{paths.join(self.place, blocks.INDEX)} has no checksums of {name}."
            )
        return self._files[name]

    def sums(self, file: BlockFile) -> np.ndarray:
        """Returns the sums of lengths before each block of a file of lengths, int64; see data/cache/blocks.py."""
        begin = file.skip + file.count * blocks.SUM
        return np.frombuffer(self._table(file), "<i8", file.count, begin)

    def read(
        self, keys: np.ndarray, file_of: np.ndarray, files: Sequence[BlockFile]
    ) -> list[bytes]:
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

    def _table_request(self, entry: BlockFile) -> "bytes | _Request":
        key = entry.table_key
        with self._tables.lock:
            found = self._tables.get(key)
            if found is None:
                size = sum(map(blocks.table_bytes, *zip(*entry.group.files.items(), strict=True)))
                table, keys = entry.group.table, range(key, key + 1)
                found = _Request(self, self._tables, table, 0, size, keys, entry)
        return found

    def _table(self, entry: BlockFile) -> bytes:
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
                else:
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
                if (kind := spec["driver"]) in ("s3", "gcs"):
                    spec[f"{kind}_request_retries"] = _RETRIES
                    spec[f"{kind}_request_concurrency"] = {"limit": _AT_ONCE}
                with paths.reporting(self.place):
                    self._store = tensorstore.KvStore.open(spec).result()
            return self._store


class _Request:
    """A request for a range of a file, which any thread finishes that needs it."""

    def __init__(
        self,
        folder: BlockFolder,
        cache: BlockCache,
        name: str,
        begin: int,
        end: int,
        keys: range,
        entry: BlockFile,
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
        """Waits for the blocks; raises as `BlockFolder.finish`."""
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
