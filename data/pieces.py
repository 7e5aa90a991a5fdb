"""Pieces of files that are read alone, and their grouping into the shards of a cache.

A source is a sequence of pieces in the order of its documents. A piece is a range of lines of a plain file, a range of row
groups of a Parquet file, or a whole file. What a piece yields depends on the files alone: not on the number of processes,
and not on which of them reads it.
"""

import dataclasses
from collections.abc import Iterable, Sequence

# Plain files are divided at the first line that begins at or after each multiple of this: a piece can be read in a second.
BLOCK_BYTES = 8 << 20
_SHARD_BYTES = (32_000_000, 256_000_000)  # of source files as stored; least and most
_SHARDS = 64  # above the least and below the most bytes

Mark = tuple[int, int]  # where a line begins, in bytes, and the number of lines before it


@dataclasses.dataclass(frozen=True)
class Piece:
    """A range of a file that can be read alone.

    Attributes:
      path: the file; or, of a source that divides itself, the name of its split.
      begin, end: bytes of a plain file, from the beginning of a line to the beginning of another one; row groups of a Parquet
        file; bytes of an Arrow file, from the beginning of a record batch; of a source that divides itself, the number of the part and the number of all parts. An `end` of None is the
        end of the file.
      first: the number of the first line or row, from 1.
      size: its bytes as stored; 0 if they do not matter.
      version: of the file (`common.storage.ranges.version`) or object, which its reader compares; empty for any.
    """

    path: str
    begin: int = 0
    end: int | None = None
    first: int = 1
    size: int = 0
    version: str = ""


def of_lines(path: str, size: int, marks: Sequence[Mark]) -> tuple[Piece, ...]:
    """Returns the pieces of a plain file of `size` bytes that is divided at marks."""
    marks = [(0, 0), *((begin, lines) for begin, lines in marks)]
    ends = [*(begin for begin, _ in marks[1:]), size]
    if len(marks) == 1:
        return (Piece(path, size=size),)
    return tuple(
        Piece(path, begin, end, lines + 1, end - begin)
        for (begin, lines), end in zip(marks, ends, strict=True)
    )


def parts(name: str, count: int) -> tuple[Piece, ...]:
    """Returns `count` pieces of a source that divides itself."""
    return tuple(Piece(name, number, count) for number in range(count))


def batches(pieces: Iterable[Piece]) -> tuple[tuple[Piece, ...], ...]:
    """Returns neighbouring pieces together, of at least BLOCK_BYTES but for the last ones: enough work for a process."""
    found: list[list[Piece]] = []
    size = BLOCK_BYTES
    for piece in pieces:
        if size >= BLOCK_BYTES:
            found.append([])
            size = 0
        found[-1].append(piece)
        size += piece.size
    return tuple(map(tuple, found))


def grouped(pieces: Iterable[Piece]) -> tuple[tuple[Piece, ...], ...]:
    """Returns pieces in shards: neighbours together, about 1/64 of all bytes each, but between 32 MB and 256 MB.

    Small data are one shard. All pieces of a larger source should have a size.
    """
    pieces = tuple(pieces)
    total = sum(piece.size for piece in pieces)
    least, most = _SHARD_BYTES
    count = -(-total // min(max(-(-total // _SHARDS), least), most))
    shards: dict[int, list[Piece]] = {}
    before = 0
    for piece in pieces:  # it belongs to the shard in which its middle lies
        middle = 2 * before + piece.size
        shards.setdefault(count * middle // (2 * total) if total else 0, []).append(piece)
        before += piece.size
    return tuple(map(tuple, shards.values())) or ((),)
