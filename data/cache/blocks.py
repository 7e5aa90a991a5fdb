"""Checksums of blocks of 64 KiB, so that a part of a file can be read and verified alone.

Files are in groups; in a token cache, a group is a shard. Each group has one file of checksums, its table: for every file in
turn, 8 bytes for each block, and then, for files of lengths (`.len`), the sum of all lengths before each block (int64), from
which a record's place is found without the lengths of all records before it. `blocks.json` names the groups, their files with
sizes, the SHA-256 of each table, and what the files are of (the `content` of a cache's manifest). It is written after all
tables, so that tables are complete when it is there.

A checksum is the beginning of the block's SHA-256, the hash of all other files here. Of damaged blocks, one in 2^64 is not
noticed. It costs 0.6 ns a byte where processors have instructions for it (all servers since 2021), 2% of a core at a million
tokens a second. It protects from damage, not from people who can write to the cache.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import types
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from espalier.common import files
from espalier.common.storage import paths, ranges
from espalier.data.cache.cache_files import CacheCorruptError, canonical, corrupt

BYTES = 1 << 16  # of a block
SUM = 8  # bytes of a checksum
INDEX = "blocks.json"
_FORMAT = 1
THREADS = 8


@dataclasses.dataclass(frozen=True)
class Group:
    """Files whose checksums are in one table."""

    table: str  # name of the table
    sha256: str  # of the table
    files: dict[str, int]  # name -> bytes, in the order of the table


def number(size: int) -> int:
    """Returns the number of blocks of a file."""
    return -(-size // BYTES)


def checksum(block: bytes | memoryview) -> bytes:
    """Returns the checksum of one block."""
    return hashlib.sha256(block).digest()[:SUM]


def has_sums(name: str) -> bool:
    """Returns whether the table has sums of lengths for a file."""
    return name.endswith(".len")


def table_bytes(name: str, size: int) -> int:
    """Returns the bytes of the table for a file."""
    return number(size) * (SUM + 8 * has_sums(name))


class FileTable:
    """The part of a table for one file, made of its blocks in turn.

    Attributes:
      size: bytes of the file so far.
      sha256: the hash of the file so far.
    """

    def __init__(self, name: str):
        self.size, self.sha256 = 0, hashlib.sha256()
        self._sums: list[int] | None = [] if has_sums(name) else None
        self._total, self._checksums = 0, bytearray()

    def add(self, block: bytes | memoryview) -> None:
        """Adds the next block; only the last may be shorter than others."""
        self.size += len(block)
        self.sha256.update(block)
        self._checksums += checksum(block)
        if self._sums is not None:
            self._sums.append(self._total)
            self._total += int(np.frombuffer(block, "<u4").sum(dtype=np.int64))

    def content(self) -> bytes:
        return bytes(self._checksums) + np.array(self._sums or [], "<i8").tobytes()


def table_of(
    place: str | os.PathLike, names: Iterable[str]
) -> tuple[bytes, dict[str, tuple[int, str]]]:
    """Returns the table of files of a folder or an address, and {file: (bytes, SHA-256)}, as they were read."""
    parts, entries = [], {}
    for name in names:
        part = FileTable(name)
        with ranges.opened(paths.join(place, name)) as file:
            while block := file.read(BYTES):
                part.add(block)
        parts.append(part.content())
        entries[name] = (part.size, part.sha256.hexdigest())
    return b"".join(parts), entries


def write(place: str | os.PathLike, name: str, content: bytes) -> None:
    """Writes a table or `blocks.json` to a folder or an address."""
    if paths.is_remote(place):
        paths.write(paths.join(place, name), content)
    else:
        files.write(paths.join(place, name), content, synced=True)


def write_table(
    place: str | os.PathLike, table: str, names: Iterable[str], written: Mapping[str, Sequence]
) -> None:
    """Writes the table of files of a folder or an address.

    Args:
      place: where the files are.
      table: its name.
      names: of its files.
      written: [bytes, SHA-256] of files as they were written, by name; others are taken as they are read.

    Raises:
      CacheCorruptError: a file is not what was written.
      OSError: a file cannot be read or written.
    """
    content, found = table_of(place, names)
    for name, entry in found.items():
        if name in written and entry != tuple(written[name]):
            raise corrupt(os.fspath(place), name, "does not match its checksum")
    write(place, table, content)


def write_index(
    place: str | os.PathLike,
    groups: Mapping[str, Mapping[str, int]],
    *,
    of: str,
    written: Mapping[str, Sequence] = types.MappingProxyType({}),
) -> None:
    """Writes `blocks.json` of a folder or an address, and the tables that it lacks.

    Args:
      place: where the files are.
      groups: name of each table -> its files with their sizes.
      of: what the files are of; readers compare it.
      written: see `write_table`.

    Raises:
      CacheCorruptError: a file is not what was written.
      OSError: a file cannot be read or written.
    """

    def made(item: tuple[str, Mapping[str, int]]) -> Group:
        table, sizes = item
        if not paths.exists(paths.join(place, table)):
            write_table(place, table, sizes, written)
        raw = paths.read(paths.join(place, table))
        return Group(table, hashlib.sha256(raw).hexdigest(), dict(sizes))

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        content = index_bytes(pool.map(made, groups.items()), of=of)
    write(place, INDEX, content)


def groups_of(shards: Iterable[Mapping], first: int = 0) -> dict[str, dict[str, int]]:
    """Returns {table: {file: bytes}} of the shards of a token cache, by their entries in its manifest, from number `first` on."""
    return {
        f"{number:05d}.blocks": {
            name: size
            for name, (size, _) in sorted(shard["files"].items())
            if not name.endswith(".json")
        }
        for number, shard in enumerate(shards, start=first)
    }


def entries_of(shards: Iterable[Mapping]) -> dict[str, Sequence]:
    """Returns [bytes, SHA-256] of each file of the shards of a token cache, by their entries in its manifest."""
    return {name: entry for shard in shards for name, entry in shard["files"].items()}


def index_bytes(groups: Iterable[Group], *, of: str) -> bytes:
    """Returns the content of `blocks.json`."""
    tables = {
        group.table: {"sha256": group.sha256, "files": list(group.files.items())}
        for group in groups
    }
    body = {"format": _FORMAT, "block": BYTES, "of": of, "tables": tables}
    sha256 = hashlib.sha256(canonical(body)).hexdigest()
    return canonical({"body": body, "sha256": sha256}) + b"\n"


def parse_index(raw: bytes, place: str, *, of: str) -> list[Group]:
    """Returns the groups of `blocks.json`.

    Raises:
      CacheCorruptError: it is altered, of another version, or of other files than `of`.
    """
    try:
        whole = json.loads(raw)
        body = whole["body"]
        intact = whole["sha256"] == hashlib.sha256(canonical(body)).hexdigest()
        intact = intact and (body["format"], body["block"]) == (_FORMAT, BYTES)
    except (ValueError, KeyError, TypeError):
        intact = False
    address = paths.join(place, INDEX)
    if not intact:
        raise CacheCorruptError(
            f"{address} is altered, or of another version. Make it again: `espalier prepare cache --checksums`."
        )
    if body["of"] != of:
        raise CacheCorruptError(
            f"{address} has the checksums of other files than {place} holds now. Make them again: "
            "`espalier prepare cache --checksums`."
        )
    return [
        Group(table, entry["sha256"], dict(entry["files"]))
        for table, entry in body["tables"].items()
    ]
