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

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO

import numpy as np

from espalier.common import files
from espalier.common.storage import paths
from espalier.data.cache.cache_files import CacheCorruptError, canonical

BYTES = 1 << 16  # of a block
SUM = 8  # bytes of a checksum
INDEX = "blocks.json"
_FORMAT = 1


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


def split(file: BinaryIO) -> Iterator[bytes]:
    """Yields the blocks of an open file."""
    while block := file.read(BYTES):
        yield block


def write_table(folder: pathlib.Path, table: str, names: Iterable[str]) -> None:
    """Writes the table of files of a folder of this machine."""
    parts = []
    for name in names:
        part = FileTable(name)
        with open(folder / name, "rb") as file:
            for block in split(file):
                part.add(block)
        parts.append(part.content())
    files.write(folder / table, b"".join(parts), synced=True)


def write_index(folder: pathlib.Path, groups: Mapping[str, Iterable[str]], *, of: str) -> None:
    """Writes `blocks.json` of a folder of this machine, and the tables that it lacks.

    Args:
      folder: where the files are.
      groups: name of each table -> names of its files.
      of: what the files are of; readers compare it.
    """
    made = []
    for table, names in groups.items():
        names = list(names)
        if not (folder / table).exists():
            write_table(folder, table, names)
        sizes = {name: os.path.getsize(folder / name) for name in names}
        sha256 = hashlib.sha256((folder / table).read_bytes()).hexdigest()
        made.append(Group(table, sha256, sizes))
    files.write(folder / INDEX, index_bytes(made, of=of), synced=True)


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
