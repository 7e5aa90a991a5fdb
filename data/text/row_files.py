"""Rows of files: lines of text and of JSON (plain, .gz, .zst), read one at a time, each with its number and its place.

A problem with a row is an error that names the file, the line and the byte, or, where the caller collects bad rows, an entry
of that list, after which reading goes on. A file that cannot be read on is always an error.
"""

import contextlib
import gzip
import io
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from espalier.common.storage import paths, ranges
from espalier.data.pieces import Piece

# Longest line, and longest document of a text file: a small compressed file may hold terabytes.
MAX_BYTES = 64 << 20
COMPRESSED = (".gz", ".zst")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What happens to a row that cannot be used: it is an error, or it is left out, counted and listed.
OnBadRow = Literal["error", "skip"]


class DataError(ValueError):
    """A file that cannot be used as data."""


class SettingError(DataError):
    """A setting that is missing or wrong, found at a row; it is an error whatever happens to bad rows."""


class BadRow(NamedTuple):
    """A row that cannot be used."""

    path: str
    row: int  # number of its line, or of its row in a Parquet file
    offset: int | None  # of the line's first byte in the text of the file; None in a Parquet file
    reason: str

    def __str__(self) -> str:
        where = f"{self.path}:{self.row}"
        return f"{where}:{self.offset}" if self.offset is not None else where


def bad_rows_text(counted: Mapping[str, Any]) -> str:
    """Returns a message about the bad rows of a source; `counted` has their number, the first ones and the file that lists all."""
    return f"{counted['rows']:,} rows cannot be used and are left out, the first is {counted['first'][0]} (all: {counted['all']})"


BadRows = list[BadRow] | None  # None: a bad row is an error
MAX_BAD_ROWS = 100_000  # of a source, that are left out


class Line(NamedTuple):
    """A line of a text file."""

    number: int  # from 1
    offset: int  # of its first byte, in the text of the file
    text: str
    size: int  # in bytes


class Row(NamedTuple):
    """A row of a file of JSON lines or Parquet."""

    number: int  # of the line, from 1; of the row of a Parquet file, from 0
    where: str  # file and line, for errors
    content: dict[str, Any]
    offset: int | None = None  # see BadRow


def piece_of(path: str | os.PathLike | Piece) -> Piece:
    """Returns a piece, or the whole file."""
    return path if isinstance(path, Piece) else Piece(os.fspath(path))


def refuse(
    error: DataError, bad: BadRows, path: str | os.PathLike, row: int, offset: int | None
) -> None:
    """Raises an error of a row, or adds it to the bad rows; raises what is an error of a setting."""
    if bad is None or isinstance(error, SettingError):
        raise error from None
    reason = str(error).removeprefix(os.fspath(path)).lstrip(":, ")
    bad.append(BadRow(os.fspath(path), row, offset, reason))
    check_number(len(bad), bad[0])


def check_number(number: int, first: BadRow) -> None:
    """Raises DataError if so many rows are bad that the files cannot be what the settings say. All rows are held in memory."""
    if number > MAX_BAD_ROWS:
        raise DataError(
            f"{first.path}: more than {MAX_BAD_ROWS:,} rows cannot be used, the first is {first}: {first.reason}. The files "
            "are not what the settings say: correct the files, or their format and columns"
        )


def lines(piece: Piece, max_bytes: int, remedy: str = "", bad: BadRows = None) -> Iterator[Line]:
    """Yields the lines of a text file, compressed or not, or of a piece of a plain file, one at a time.

    Raises:
      DataError: the file cannot be decompressed; or a line is too long or not UTF-8, and bad rows are not collected.
    """
    path, offset = piece.path, piece.begin
    number = piece.first - 1
    with _opened(piece) as file:
        try:
            while piece.end is None or offset < piece.end:
                raw = file.readline(max_bytes + 1)
                if not raw:
                    return
                number, begin = number + 1, offset
                offset += len(raw)
                if len(raw) > max_bytes:
                    error = DataError(
                        f"{path}, line {number}: longer than {max_bytes:,} bytes, the limit for a line{_at(begin)}. "
                        f"Divide or delete the line{remedy}"
                    )
                    refuse(error, bad, path, number, begin)
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(1 << 20)
                        offset += len(raw)
                    continue
                skipped = (
                    len(_BYTE_ORDER_MARK) if number == 1 and raw.startswith(_BYTE_ORDER_MARK) else 0
                )
                try:
                    text = raw[skipped:].decode("utf-8")
                except UnicodeDecodeError as error:
                    what = DataError(
                        f"{path}: not UTF-8 at byte offset {begin + skipped + error.start} (line {number}): "
                        f"{error.reason}. Convert the file (iconv -t UTF-8) or delete the line"
                    )
                    refuse(what, bad, path, number, begin)
                    continue
                yield Line(number, begin, text, len(raw))
        except paths.StoreError:
            raise
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{path}: cannot be read after {offset} bytes of text ({error}). The file is truncated, "
                "damaged, or not compressed as its suffix says; copy or write it again"
            ) from None


@contextlib.contextmanager
def _opened(piece: Piece) -> Iterator[BinaryIO]:
    """Yields the text of a file, decompressed, from the beginning of the piece on."""
    suffix = pathlib.Path(piece.path).suffix.lower()
    if suffix not in COMPRESSED:
        with ranges.opened(
            piece.path, version=piece.version, begin=piece.begin, end=piece.end
        ) as file:
            yield file
        return
    with ranges.opened(piece.path, version=piece.version) as file:
        if suffix == ".gz":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))
            return
        # Arrow reads all frames and raises for a truncated frame; the reader of zstandard does not.
        import pyarrow

        source = file if paths.is_remote(piece.path) else piece.path
        with pyarrow.input_stream(source, compression="zstd") as stream:
            yield io.BufferedReader(stream)


@contextlib.contextmanager
def compressed(file: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """Yields what compresses to an open file as a name says, or else the file itself."""
    suffix = pathlib.Path(name).suffix.lower()
    if suffix == ".gz":
        with gzip.GzipFile("", "wb", fileobj=file) as stream:
            yield cast(BinaryIO, stream)
    elif suffix == ".zst":
        import pyarrow

        with (  # pyarrow closes what it is given
            open(os.dup(file.fileno()), "wb") as again,
            pyarrow.CompressedOutputStream(again, "zstd") as stream,
        ):
            yield stream
    else:
        yield file


def read_lines(path: pathlib.Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 text file without their ends; raises DataError if it is malformed."""
    return (line.text.rstrip("\r\n") for line in lines(piece_of(path), MAX_BYTES))


def json_rows(
    piece: Piece,
    *,
    example: str = '{"text": "..."}',
    max_bytes: int = MAX_BYTES,
    remedy: str = "",
    bad: BadRows = None,
) -> Iterator[Row]:
    """Yields the rows of a file of JSON lines, plain or compressed, or of a piece of a plain one; blank lines are skipped.

    Args:
      piece: the file, or a part of it.
      example: an example of a line, which error messages show.
      max_bytes: longest line.
      remedy: ends the message about a line that is too long.
      bad: collects rows that cannot be used; None: they are errors.

    Raises:
      DataError: a line is not a JSON object or longer than `max_bytes`, or the file cannot be read as text.
    """
    for number, offset, line, _ in lines(piece, max_bytes, remedy, bad):
        if not line.strip():
            continue
        where = f"{piece.path}, line {number}"
        try:
            record = json.loads(line)
            problem = ""
        except (ValueError, RecursionError) as error:
            record = None
            problem = f"malformed JSON: {_json_problem(error)}{_at(offset)}. Each line must be one object such as {example}"
        if not problem and not isinstance(record, dict):
            problem = (
                f"a JSON {type(record).__name__} where an object is expected, such as {example}"
            )
        if problem:
            refuse(DataError(f"{where}: {problem}"), bad, piece.path, number, offset)
            continue
        yield Row(number, where, record, offset)


def read_json_lines(
    path: pathlib.Path, *, example: str = '{"text": "..."}'
) -> Iterator[tuple[int, dict]]:
    """Yields (line number from 1, object) of a file of JSON lines; see `json_rows`."""
    return ((row.number, row.content) for row in json_rows(piece_of(path), example=example))


def _at(offset: int) -> str:
    return f" (the line begins at byte offset {offset})"


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    return f"a number has too many digits ({str(error).partition(';')[0]})"
