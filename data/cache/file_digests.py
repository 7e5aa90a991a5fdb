"""SHA-256 digests of source files, and where their lines begin, from one pass over each file; stored between runs."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from espalier.data import pieces
from espalier.data.cache import cache_dir as cache
from espalier.data.pieces import Mark

_CHUNK = 1 << 20  # bytes that are read at once


class _Digest(NamedTuple):
    sha256: str
    # of a file that is larger than a block: the size of a block, and the marks; None if lines were not looked for
    block: int | None = None
    marks: tuple[Mark, ...] = ()


class FileDigests:
    """SHA-256 digests of source files, stored between runs.

    A stored digest is valid while the file's size, modification time, change time and inode are
    equal. Programs such as `cp -p` and `rsync -t` can set the modification time, but not the change
    time.
    """

    def __init__(self, memory: pathlib.Path):
        self._memory = memory
        self._new: dict[str, list] = {}
        self._known = self._stored()

    def digest(self, path: str) -> str:
        """Returns the SHA-256 of one file, in hexadecimal."""
        return self._of(path, by_line=False).sha256

    def marks(self, path: str) -> tuple[Mark, ...]:
        """Returns where lines begin: the first one at or after each multiple of `pieces.BLOCK_BYTES`, if there is one."""
        return self._of(path, by_line=True).marks

    def read(self, paths: Iterable[str], by_line: Iterable[str] = ()) -> None:
        """Reads files whose digests are not known, several at a time; those `by_line` also for `marks`."""
        divided = set(by_line)
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for _ in threads.map(lambda path: self._of(path, by_line=path in divided), paths):
                pass

    def save(self) -> None:
        """Stores new digests."""
        if self._new:
            cache.remember(self._memory, {**self._stored(), **self._new})

    def _stored(self) -> dict[str, list]:
        try:
            known = json.loads(self._memory.read_bytes())
        except (OSError, ValueError):
            return {}  # Without stored digests, files are only hashed again.
        return known if isinstance(known, dict) else {}

    def _of(self, path: str, *, by_line: bool) -> _Digest:
        stat = os.stat(path)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        by_line = by_line and stat.st_size > pieces.BLOCK_BYTES
        name = os.path.abspath(path)
        entry = self._new.get(name) or self._known.get(name)
        if isinstance(entry, list) and len(entry) in (5, 7) and entry[:4] == stamp:
            known = _Digest(*entry[4:])
            if not by_line or known.block == pieces.BLOCK_BYTES:
                return known
        made = _read(path, pieces.BLOCK_BYTES if by_line else None)
        self._new[name] = [*stamp, made.sha256, *([made.block, made.marks] if by_line else [])]
        return made


def _read(path: str, block: int | None) -> _Digest:
    checksum, marks = hashlib.sha256(), []
    offset = lines = 0
    boundary = block
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            checksum.update(data)
            if boundary is not None and block is not None:
                # The line begins after the first line end at or after the byte before the boundary.
                while (at := data.find(b"\n", max(boundary - 1 - offset, 0))) >= 0:
                    begin = offset + at + 1
                    marks.append((begin, lines + data.count(b"\n", 0, at + 1)))
                    boundary = (begin // block + 1) * block
                lines += data.count(b"\n")
            offset += len(data)
    return _Digest(checksum.hexdigest(), block, tuple(m for m in marks if m[0] < offset))
