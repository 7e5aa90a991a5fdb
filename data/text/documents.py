"""Reads documents from files, one at a time: JSON lines (plain, .gz, .zst), text, Parquet and Arrow.

Every problem with a file raises one `DataError` with the file, the position in it and the remedy.
"""

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, cast

from espalier.common.ranges import check_choice
from espalier.data.text import tables
from espalier.data.text.data_error import DataError as DataError

# Part of the hash of a set of files: raise it when the same files are read as different documents.
VERSION = 1
SUFFIXES = (".jsonl", ".json", ".txt", ".md", *tables.SUFFIXES)
COMPRESSED = (".gz", ".zst")
# Longest line, and longest document of a text file: a small compressed file may hold terabytes.
MAX_BYTES = 64 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """A document: its name, its text, and the requested metadata."""

    id: str
    text: str
    metadata: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Format:
    """How documents are stored in files.

    Raises:
      ValueError: there is no text key, `document_per` is unknown, or `max_document_bytes` is not positive.
    """

    # key (JSON) or column (Parquet, Arrow) of the text. With several keys, such as instruction, context
    # and answer, the texts that are not empty are joined by blank lines
    text_key: str | tuple[str, ...] = "text"
    # key or column of the document's name; by default the name is the file and the line
    id_key: str | None = None
    # unit of a document in a text file: the `file`, a `paragraph` (separated by blank lines) or a
    # `line`
    document_per: str = "file"
    # longest line, and longest document of a text file, in bytes; longer ones are errors
    max_document_bytes: int = MAX_BYTES

    @property
    def text_keys(self) -> tuple[str, ...]:
        return (self.text_key,) if isinstance(self.text_key, str) else self.text_key

    def __post_init__(self):
        if not self.text_keys:
            raise ValueError("text_key is empty; name the key or column of the text")
        check_choice("document_per", self.document_per, ("file", "paragraph", "line"))
        if self.max_document_bytes < 1:
            raise ValueError(
                f"max_document_bytes is {self.max_document_bytes}; it must be positive"
            )


def read(
    path: pathlib.Path, format: Format, *, name: str | None = None, metadata: Sequence[str] = ()
) -> Iterator[Document]:
    """Returns an iterator over the documents of a file, in order, including empty documents.

    Args:
      path: the file; its suffixes determine its kind.
      format: how documents are stored in it.
      name: prefix of the document ids; default the name of the file.
      metadata: further keys or columns to read, dotted for nested keys.

    Raises:
      DataError: the file is malformed, not UTF-8, cannot be decompressed, or is of an unknown kind; or a
        line or document is too long.
    """
    name = path.name if name is None else name
    kind = _kind(path)
    if kind in (".jsonl", ".json", *tables.SUFFIXES):
        records = (_table if kind in tables.SUFFIXES else _json_lines)(path, format, metadata)
        return (_document(name, *record, format, metadata) for record in records)
    if metadata:
        raise DataError(
            f"{path}: a text file has no metadata {', '.join(map(repr, metadata))} to filter by; "
            "remove these filters, or use JSON lines, Parquet or Arrow"
        )
    return _text(path, format, name)


def take(documents: Iterable[Document], num_bytes: float) -> Iterator[Document]:
    """Yields whole documents until their texts have at least `num_bytes` bytes."""
    taken = 0
    for document in documents:
        if taken >= num_bytes:
            return
        taken += len(document.text.encode("utf-8"))
        yield document


def check_suffix(path: pathlib.Path) -> None:
    """Raises DataError if `read` does not support this kind of file."""
    _kind(path)


def _kind(path: pathlib.Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED and bool(suffixes.pop())
    if (
        not suffixes
        or suffixes[-1] not in SUFFIXES
        or compressed
        and suffixes[-1] in tables.SUFFIXES
    ):
        raise DataError(
            f"{path}: unknown kind of data file; supported are {', '.join(SUFFIXES)}, and all but "
            f"{' and '.join(tables.SUFFIXES)} also with {' or '.join(COMPRESSED)}"
        )
    return suffixes[-1]


def _lines(path: pathlib.Path, max_bytes: int, remedy: str = "") -> Iterator[tuple[int, str, int]]:
    """Yields (line number from 1, line, its bytes) of a text file, compressed or not; a line at a time."""
    offset = 0
    with _open(path) as file:
        try:
            lines = iter(lambda: file.readline(max_bytes + 1), b"")
            for number, raw in enumerate(lines, start=1):
                if len(raw) > max_bytes:
                    raise DataError(
                        f"{path}, line {number}: longer than {max_bytes:,} bytes, the limit for a line. "
                        f"Divide or delete the line{remedy}"
                    )
                yield number, _decoded(raw, path, number, offset), len(raw)
                offset += len(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{path}: cannot be read after {offset} bytes of text ({error}). The file is truncated, "
                "damaged, or not compressed as its suffix says; copy or write it again"
            ) from None


def _decoded(raw: bytes, path: pathlib.Path, number: int, offset: int) -> str:
    skipped = len(_BYTE_ORDER_MARK) if number == 1 and raw.startswith(_BYTE_ORDER_MARK) else 0
    try:
        return raw[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte offset {offset + skipped + error.start} (line {number}): "
            f"{error.reason}. Convert the file (iconv -t UTF-8) or delete the line"
        ) from None


def _open(path: pathlib.Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        # Arrow reads all frames and raises for a truncated frame; the reader of zstandard does not.
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


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
    return (line.rstrip("\r\n") for _, line, _ in _lines(path, MAX_BYTES))


def read_json_lines(
    path: pathlib.Path,
    *,
    example: str = '{"text": "..."}',
    max_bytes: int = MAX_BYTES,
    remedy: str = "",
) -> Iterator[tuple[int, dict]]:
    """Yields (line number from 1, object) of a JSON lines file, plain or compressed.

    Blank lines are skipped. Error messages show `example`, an example of a line, and of a line that is too long
    end with `remedy`.

    Raises:
      DataError: a line is not a JSON object or longer than `max_bytes`, or the file cannot be read as text.
    """
    for number, line, _ in _lines(path, max_bytes, remedy):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: malformed JSON: {_json_problem(error)}. Each line must be one object "
                f"such as {example}"
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: a JSON {type(record).__name__} where an object is expected, such as "
                f"{example}"
            )
        yield number, record


def read_rows(
    path: pathlib.Path, *, example: str, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yields (number, place for errors, row) of a file of JSON lines, Parquet or Arrow.

    Parquet and Arrow have a value for each key of each row: keys with null are removed from their rows, at any depth.

    Args:
      path: the file.
      example: an example of a line, for error messages.
      columns: those that are read of Parquet and Arrow, which each row then has, perhaps with null; None for all.

    Raises:
      DataError: the file is of another kind or malformed, or lacks a column.
    """
    check_rows(path, example)
    if _kind(path) in tables.SUFFIXES:
        read = None if columns is None else dict.fromkeys(columns, "columns")
        for number, where, row in tables.rows(path, read):
            if columns is not None:
                yield number, where, {key: _without_nulls(value) for key, value in row.items()}
            else:
                yield number, where, _without_nulls(row)
        return
    for number, row in read_json_lines(path, example=example):
        yield number, f"{path}, line {number}", row


def check_rows(path: pathlib.Path, example: str) -> None:
    """Raises DataError if `read_rows` does not support this kind of file."""
    if _kind(path) not in (".jsonl", ".json", *tables.SUFFIXES):
        raise DataError(
            f"{path}: rows are read from JSON lines (.jsonl or .json, also with .gz or .zst), Parquet or Arrow; "
            f"write one object such as {example} per line"
        )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    return f"a number has too many digits ({str(error).partition(';')[0]})"


_RAISE = ", or raise max_document_bytes"


def _json_lines(
    path: pathlib.Path, format: Format, metadata: Sequence[str]
) -> Iterator[tables.Record]:
    example = f'{{"{format.text_keys[0]}": "..."}}'
    limit = format.max_document_bytes
    records = read_json_lines(path, example=example, max_bytes=limit, remedy=_RAISE)
    for number, record in records:
        yield number, f"{path}, line {number}", record


def _document(
    name: str,
    number: int,
    where: str,
    record: Mapping[str, Any],
    format: Format,
    metadata: Sequence[str],
) -> Document:
    id = f"{name}:{number}"
    if format.id_key is not None:
        id = str(tables.value_of(record, format.id_key, "id_key", where))
        check_unicode(id, format.id_key, where)
    texts = [
        _checked(tables.value_of(record, key, "text_key", where), key, where)
        for key in format.text_keys
    ]
    text = texts[0] if len(texts) == 1 else "\n\n".join(filter(None, texts))
    values = {key: _inner(record, key, where) for key in metadata}
    return Document(id, text, values) if values else Document(id, text)


def _inner(record: Mapping[str, Any], key: str, where: str) -> Any:
    """Returns the value of a dotted key."""
    value: Any = record
    for part in key.split("."):
        value = tables.value_of(
            value if isinstance(value, Mapping) else {}, part, "the filter's key", where
        )
    return value


def _checked(text: object, key: str, where: str) -> str:
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {key!r} is a {type(text).__name__}, not a string. Set text_key to the key of the "
            "text, or convert the file"
        )
    check_unicode(text, key, where)
    return text


def check_unicode(text: str, key: str, where: str) -> None:
    """Raises DataError if a text has half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {key!r} is not valid Unicode at character {error.start} (half of a "
            "surrogate pair). Repair or delete the line"
        ) from None


def _text(path: pathlib.Path, format: Format, name: str) -> Iterator[Document]:
    limit = format.max_document_bytes
    lines = _lines(path, limit, _RAISE)
    if format.document_per == "file":
        yield Document(name, _joined(lines, path, limit)[1])
    elif format.document_per == "line":
        for number, line, _ in lines:
            yield Document(f"{name}:{number}", line.rstrip("\r\n"))
    else:
        for blank, group in itertools.groupby(lines, key=lambda line: not line[1].strip()):
            if not blank:
                first, text = _joined(group, path, limit)
                yield Document(f"{name}:{first}", text)


def _joined(
    lines: Iterable[tuple[int, str, int]], path: pathlib.Path, limit: int
) -> tuple[int | None, str]:
    """Returns the number of the first line and the text of all; raises DataError if it exceeds `limit` bytes."""
    text, size, first = io.StringIO(newline=""), 0, None
    for number, line, length in lines:
        first = number if first is None else first
        size += length
        if size > limit:
            raise DataError(
                f"{path}, line {number}: the document is longer than {limit:,} bytes. Set document_per to "
                "'paragraph' or 'line', divide the file, or raise max_document_bytes"
            )
        text.write(line)
    return first, text.getvalue()


def _table(path: pathlib.Path, format: Format, metadata: Sequence[str]) -> Iterator[tables.Record]:
    arguments = {key.partition(".")[0]: "the filter's key" for key in metadata}
    arguments |= {} if format.id_key is None else {format.id_key: "id_key"}
    arguments |= dict.fromkeys(format.text_keys, "text_key")
    return tables.rows(path, arguments)
