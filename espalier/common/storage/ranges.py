"""Files that are read in place: those of this machine, and objects of a store as streams of ranges, which read ahead.

An object that is read in several requests may be replaced between them. Its version is compared before and after, so that what
was read is of one version, which the caller may name; of a file of this machine, if the caller names one.
"""

import collections
import concurrent.futures
import contextlib
import io
import os
import time
from collections.abc import Iterator
from typing import BinaryIO

from espalier.common.storage import paths

# Bytes of a request: the first one after a jump, and the most, which are reached by doubling while reading goes straight on.
_FIRST, _MOST = 256 << 10, 4 << 20
_AHEAD = 3  # requests under way while reading goes straight on: 240 MB/s at 50 ms each
_TRIES = 4  # of a request, after those of the store's own client
_PAUSE_SECONDS = 0.5  # doubled with every try
_BUFFER = 1 << 20


class ChangedError(paths.StoreError):
    """A file or object was changed or deleted since its version was noted, or while it was read."""


def size(path: str | os.PathLike) -> int:
    """Returns the bytes of a file or object; raises FileNotFoundError, and StoreError."""
    return paths.entry(os.fspath(path)).size if paths.is_remote(path) else os.path.getsize(path)


def version(path: str | os.PathLike) -> str:
    """Returns a text that changes with the content of a file of this machine: its size, and times of modification and change.

    Programs such as `cp -p` and `rsync -t` can set the modification time, but not the change time. The inode is left out: some
    network file systems number files differently on each machine.
    """
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


@contextlib.contextmanager
def opened(
    path: str | os.PathLike, *, version: str = "", begin: int = 0, end: int | None = None
) -> Iterator[BinaryIO]:
    """Yields a file or object, open for reading at the byte `begin`.

    Args:
      path: a file, or the address of an object.
      version: of an object, as in `paths.Entry`; empty: the one that is there now. Of a file, see `version`; empty: any.
      begin: where reading starts.
      end: where an object seems to end, so that nothing after it is asked for; None for its end.

    Raises:
      FileNotFoundError: there is no such file or object.
      ChangedError: the file or object has another version, before or after it was read.
      StoreError: the store refuses, or cannot be reached.
    """
    path = os.fspath(path)
    if not paths.is_remote(path):
        _check(path, version)
        with open(path, "rb", buffering=_BUFFER) as file:
            file.seek(begin)
            try:
                yield file
            except Exception:
                _check(path, version)  # which explains what was read
                raise
        _check(path, version)
        return
    now = _entry(path, version)
    version = version or now.version
    with _Stream(path, now.size if end is None else min(end, now.size)) as stream:
        stream.seek(begin)
        try:
            yield io.BufferedReader(stream, _BUFFER)
        except Exception:
            _entry(path, version)  # which explains what was read
            raise
    _entry(path, version)


def _check(path: str, before: str) -> None:
    """Raises ChangedError if a file of this machine has another version than it had, and FileNotFoundError."""
    if before and before != version(path):
        raise ChangedError(
            f"{path} was changed since this run began to read it. Start again, so that all of it is read anew."
        )


def _entry(address: str, version: str) -> paths.Entry:
    """Returns an object's entry; raises ChangedError if it has another version than it had."""
    try:
        now = paths.entry(address)
    except FileNotFoundError:
        if not version:
            raise
        raise ChangedError(f"{address} was deleted since this run began to read it.") from None
    if version and now.version != version:
        raise ChangedError(
            f"{address} was replaced since this run began to read it (it was {version}, and is {now.version}). Start again, so "
            "that all of it is read anew."
        )
    return now


class _Stream(io.RawIOBase):
    """An object up to a byte, as a file; not for several threads at once."""

    def __init__(self, address: str, end: int):
        self._address, self._end = address, end
        self._position = 0
        self._request = _FIRST
        self._begin, self._data = 0, b""  # what was read last
        # (begin, end, bytes) of requests that are under way, each after the one before
        self._ahead: collections.deque[tuple[int, int, concurrent.futures.Future[bytes]]] = (
            collections.deque()
        )
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._end}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._end - self._position)
        if wanted <= 0:
            return 0
        if not self._begin <= self._position < self._begin + len(self._data):
            self._load(wanted)
        at = self._position - self._begin
        part = memoryview(self._data)[at : at + wanted]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None
        super().close()

    def _load(self, wanted: int) -> None:
        """Reads the bytes at the position, and asks for those after them if reading goes straight on."""
        straight = self._position == self._begin + len(self._data) and self._data != b""
        while self._ahead:
            begin, end, future = self._ahead.popleft()
            if begin <= self._position < end:
                self._begin, self._data = begin, future.result()
                break
            future.cancel()
        else:
            self._request = min(2 * self._request, _MOST) if straight else _FIRST
            end = min(self._position + max(wanted, self._request), self._end)
            self._begin, self._data = self._position, _read(self._address, self._position, end)
        if straight:
            self._ask()

    def _ask(self) -> None:
        after = self._ahead[-1][1] if self._ahead else self._begin + len(self._data)
        if self._threads is None:
            self._threads = concurrent.futures.ThreadPoolExecutor(_AHEAD, "reading ahead")
        while len(self._ahead) < _AHEAD and after < self._end:
            self._request = min(2 * self._request, _MOST)
            end = min(after + self._request, self._end)
            self._ahead.append((after, end, self._threads.submit(_read, self._address, after, end)))
            after = end


def _read(address: str, begin: int, end: int) -> bytes:
    """Returns the bytes [begin, end) of an object; tries again if the store fails or sends fewer."""
    for tries in range(_TRIES):
        if tries:
            time.sleep(_PAUSE_SECONDS * 2 ** (tries - 1))
        try:
            with paths.reporting(address):
                data = paths.filesystem(address).cat_file(address, start=begin, end=end)
        except paths.StoreError:
            if tries + 1 == _TRIES:
                raise
            continue
        if len(data) == end - begin:
            return data
    raise paths.StoreError(
        f"{address}: {len(data)} bytes were read from byte {begin} on, of {end - begin}. Start again once the store answers."
    )
