"""SHA-256 digests of source files, and where their lines begin, from one pass over each file; stored between runs.

What is known of objects in a store is shared by the hosts whose root of caches is in a store: one of them reads an object, and
the others one small object for each folder of objects, `files/digests/<hash of the folder's address>.json`.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import operator
import os
import pathlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from espalier.common.bars import Bar
from espalier.common.storage import paths, ranges
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
    time. Of an object in a store it is valid while its size and version are equal.
    """

    def __init__(
        self, memory: pathlib.Path, objects: Mapping[str, paths.Entry] = MappingProxyType({})
    ):
        """Reads what was stored.

        Args:
          memory: the file of this machine; in the local copy of a root of caches that is in a store, what is known of objects
            is shared there.
          objects: the objects of a store among the files: address -> its size and version.
        """
        self._memory, self._objects = memory, objects
        self._new: dict[str, list] = {}
        self._known = self._stored()

    def digest(self, path: str) -> str:
        """Returns the SHA-256 of one file, in hexadecimal."""
        return self._of(path, by_line=False).sha256

    def marks(self, path: str) -> tuple[Mark, ...]:
        """Returns where lines begin: the first one at or after each multiple of `pieces.BLOCK_BYTES`, if there is one."""
        return self._of(path, by_line=True).marks

    def groups(self, path: str, find: Callable[[], Sequence]) -> Sequence[Sequence]:
        """Returns the groups of a file of columns, as JSON holds them: what `find` returns."""
        key, stamp = f"groups of {self._name(path)}", self._stamp(path)
        if (known := self._valid(key, stamp)) is None:
            known = self._new[key] = [*stamp, [list(group) for group in find()]]
        return known[4]

    def read(
        self,
        paths: Iterable[str],
        by_line: Iterable[str] = (),
        grouped: Mapping[str, Callable[[], Sequence]] = MappingProxyType({}),
    ) -> None:
        """Reads files whose digests are not known, several at a time, and stores what is new.

        Args:
          paths: the files.
          by_line: those that are also read for `marks`.
          grouped: those that are also read for `groups`, with what finds them.
        """
        paths, divided = list(paths), set(by_line)

        def read(path: str) -> None:
            self._of(path, by_line=path in divided)
            if path in grouped:
                self.groups(path, grouped[path])

        def is_known(path: str) -> bool:
            wanted = self._wanted(path, path in divided)
            groups = f"groups of {wanted.path}"
            return self._find(wanted) is not None and (
                path not in grouped or self._valid(groups, wanted.stamp) is not None
            )

        with self._shared([path for path in paths if path in self._objects], is_known):
            if pool.is_elsewhere():
                self._read_elsewhere(paths, divided)
            with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
                for _ in threads.map(read, paths):
                    pass
        self.save()

    def _read_elsewhere(self, paths: Sequence[str], divided: Collection[str]) -> None:
        wanted = [self._wanted(path, path in divided) for path in paths]
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
        """Stores new digests on this machine."""
        if self._new:
            cache.remember(self._memory, {**self._stored(), **self._new})

    def _stored(self) -> dict[str, list]:
        try:
            known = json.loads(self._memory.read_bytes())
        except (OSError, ValueError):
            return {}  # Without stored digests, files are only hashed again.
        return known if isinstance(known, dict) else {}

    @contextlib.contextmanager
    def _shared(self, objects: Sequence[str], is_known: Callable[[str], bool]) -> Iterator[None]:
        """Takes what other hosts know of objects; if that is not all, holds a lock, and shares what is found meanwhile."""
        unknown = [path for path in objects if not is_known(path)]
        if not unknown or cache.address_of(self._memory) is None:
            yield
            return
        folders = sorted({path.rpartition("/")[0] for path in unknown})
        self._take(folders)
        if all(map(is_known, unknown)):
            yield
            return
        with cache.building(self._place(" ".join(folders))):
            self._take(folders)
            yield
            for folder in folders:
                known = cache.recall(self._place(folder), fresh=True) or {}
                cache.remember(
                    self._place(folder), {**known, **self._known_of(folder)}, shared=True
                )

    def _take(self, folders: Sequence[str]) -> None:
        for folder in folders:
            self._new |= cache.recall(self._place(folder), fresh=True) or {}

    def _known_of(self, folder: str) -> dict[str, list]:
        return {
            key: entry
            for path in self._objects
            if path.rpartition("/")[0] == folder
            for key in (path, f"groups of {path}")
            if (entry := self._valid(key, self._stamp(path))) is not None
        }

    def _place(self, folder: str) -> pathlib.Path:
        name = hashlib.sha256(folder.encode()).hexdigest()[:32]
        return self._memory.parent / "digests" / f"{name}.json"

    def _name(self, path: str) -> str:
        return path if path in self._objects else os.path.abspath(path)

    def _stamp(self, path: str) -> list[Any]:
        if (entry := self._objects.get(path)) is not None:
            return [entry.size, entry.version, 0, 0]
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]

    def _valid(self, key: str, stamp: Sequence) -> list | None:
        for entries in (self._new, self._known):
            entry = entries.get(key)
            if isinstance(entry, list) and len(entry) in (5, 7) and entry[:4] == stamp:
                return entry
        return None

    def _wanted(self, path: str, by_line: bool) -> "_Wanted":
        stamp, entry = self._stamp(path), self._objects.get(path)
        block = pieces.BLOCK_BYTES if by_line and stamp[0] > pieces.BLOCK_BYTES else None
        version = entry.version if entry else ranges.version(path)
        return _Wanted(self._name(path), stamp, block, version)

    def _of(self, path: str, *, by_line: bool) -> _Digest:
        wanted = self._wanted(path, by_line)
        return self._find(wanted) or self._keep(wanted, _read(wanted))

    def _find(self, wanted: "_Wanted") -> _Digest | None:
        if (entry := self._valid(wanted.path, wanted.stamp)) is not None:
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
    version: str = ""


def _read(wanted: _Wanted, report: pool.Report = lambda count: None) -> _Digest:
    path, block = wanted.path, wanted.block
    checksum, marks = hashlib.sha256(), []
    offset = lines = 0
    boundary = block
    with ranges.opened(path, version=wanted.version) as file:
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
