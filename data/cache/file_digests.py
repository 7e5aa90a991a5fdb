"""SHA-256 digests of source files, and where their lines begin, from one pass over each file; stored between runs."""

import concurrent.futures
import dataclasses
import hashlib
import json
import operator
import os
import pathlib
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from espalier.common.bars import Bar
from espalier.data import pieces
from espalier.data.cache import cache_dir as cache
from espalier.data.cache import pool
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
        if pool.is_elsewhere():
            self._read_elsewhere(list(paths), divided)
            return
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for _ in threads.map(lambda path: self._of(path, by_line=path in divided), paths):
                pass

    def _read_elsewhere(self, paths: Sequence[str], divided: Collection[str]) -> None:
        wanted = [_Wanted.of(path, path in divided) for path in paths]
        unknown = [each for each in wanted if self._find(each) is None]
        if unknown:
            folders = sorted({os.path.dirname(each.path) for each in unknown})
            bar, title = Bar(total=len(unknown), file=sys.stderr), "reading checksums of files"
            what = operator.attrgetter("path")
            with bar:
                made = pool.run(_read, unknown, what=what, bar=bar, title=title, paths=folders)
            for each, digest in zip(unknown, made, strict=True):
                self._keep(each, digest)

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
        wanted = _Wanted.of(path, by_line)
        return self._find(wanted) or self._keep(wanted, _read(wanted))

    def _find(self, wanted: "_Wanted") -> _Digest | None:
        entry = self._new.get(wanted.path) or self._known.get(wanted.path)
        if isinstance(entry, list) and len(entry) in (5, 7) and entry[:4] == wanted.stamp:
            known = _Digest(*entry[4:])
            if not wanted.block or known.block == wanted.block:
                return known
        return None

    def _keep(self, wanted: "_Wanted", made: _Digest) -> _Digest:
        lines = [made.block, made.marks] if wanted.block else []
        self._new[wanted.path] = [*wanted.stamp, made.sha256, *lines]
        return made


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What is asked of a file: its digest, and where the lines at multiples of `block` bytes begin."""

    path: str
    stamp: list[int]
    block: int | None

    @classmethod
    def of(cls, path: str, by_line: bool) -> "_Wanted":
        stat = os.stat(path)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        is_divided = by_line and stat.st_size > pieces.BLOCK_BYTES
        return cls(os.path.abspath(path), stamp, pieces.BLOCK_BYTES if is_divided else None)


def _read(wanted: _Wanted, report: pool.Report = lambda count: None) -> _Digest:
    path, block = wanted.path, wanted.block
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
    report(1)
    return _Digest(checksum.hexdigest(), block, tuple(m for m in marks if m[0] < offset))
