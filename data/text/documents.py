"""Reads documents from files, one at a time: JSON lines (plain, .gz, .zst), text, Parquet and Arrow.

Every problem with a file raises one `DataError` with the file, the position in it and the remedy.
"""

import dataclasses
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from espalier.common.ranges import check_choice
from espalier.data import pieces
from espalier.data.cache.file_digests import FileDigests
from espalier.data.pieces import Piece
from espalier.data.text import row_files, tables
from espalier.data.text.arrow_files import Group
from espalier.data.text.row_files import COMPRESSED, MAX_BYTES, BadRows, Line, Row, piece_of
from espalier.data.text.row_files import DataError as DataError
from espalier.data.text.row_files import compressed as compressed
from espalier.data.text.row_files import read_json_lines as read_json_lines
from espalier.data.text.row_files import read_lines as read_lines

# Part of the hash of a set of files: raise it when the same files are read as different documents.
VERSION = 1
SUFFIXES = (".jsonl", ".json", ".txt", ".md", *tables.SUFFIXES)


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
    path: pathlib.Path | Piece,
    format: Format,
    *,
    name: str | None = None,
    metadata: Sequence[str] = (),
    bad: BadRows = None,
) -> Iterator[Document]:
    """Returns an iterator over the documents of a file, in order, including empty documents.

    Args:
      path: the file, whose suffixes determine its kind, or a piece of it.
      format: how documents are stored in it.
      name: prefix of the document ids; default the name of the file.
      metadata: further keys or columns to read, dotted for nested keys.
      bad: collects rows that cannot be used: of JSON lines, Parquet and Arrow, and lines that are documents; None: they are errors.

    Raises:
      DataError: the file is malformed, not UTF-8, cannot be decompressed, or is of an unknown kind; or a
        line or document is too long.
    """
    piece = piece_of(path)
    file = piece.path
    name = os.path.basename(file) if name is None else name
    kind = _kind(file)
    if kind in (".jsonl", ".json", *tables.SUFFIXES):
        rows = (_table if kind in tables.SUFFIXES else _json_lines)(piece, format, metadata, bad)
        return _documents(name, piece, rows, format, metadata, bad)
    if metadata:
        raise DataError(
            f"{file}: a text file has no metadata {', '.join(map(repr, metadata))} to filter by; "
            "remove these filters, or use JSON lines, Parquet or Arrow"
        )
    return _text(piece, format, name, bad)


def divided(whole: Piece, digests: FileDigests, *, document_per: str = "file") -> tuple[Piece, ...]:
    """Returns the pieces of a file that can be read alone, in its order.

    Args:
      whole: the file, with its size.
      digests: know where its lines or groups begin.
      document_per: unit of a document in a text file.

    Raises:
      DataError: the file is not readable, or of an unknown kind.
    """
    path = whole.path
    found: tuple[Piece, ...] = (whole,)
    if whole.size > pieces.BLOCK_BYTES:
        if is_table(path):
            groups = digests.groups(path, lambda: tables.groups(whole))
            found = tables.divided(path, whole.size, [Group(*group) for group in groups])
        elif is_by_line(path, document_per=document_per):
            found = pieces.of_lines(path, whole.size, digests.marks(path))
    return tuple(dataclasses.replace(piece, version=whole.version) for piece in found)


def is_table(path: str | os.PathLike) -> bool:
    """Returns whether a file is one of columns."""
    return _kind(path) in tables.SUFFIXES


def is_by_line(path: str | os.PathLike, *, document_per: str = "file") -> bool:
    """Returns whether a file is plain and each of its lines can be read without the others."""
    if os.fspath(path).lower().endswith((*COMPRESSED, *tables.SUFFIXES)):
        return False
    return _kind(path) in (".jsonl", ".json") or document_per == "line"


def take(documents: Iterable[Document], num_bytes: float) -> Iterator[Document]:
    """Yields whole documents until their texts have at least `num_bytes` bytes."""
    taken = 0
    for document in documents:
        if taken >= num_bytes:
            return
        taken += len(document.text.encode("utf-8"))
        yield document


def check_suffix(path: str | os.PathLike) -> None:
    """Raises DataError if `read` does not support this kind of file."""
    _kind(path)


def _kind(path: str | os.PathLike) -> str:
    suffixes = [suffix.lower() for suffix in pathlib.PurePath(path).suffixes]
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


def read_rows(
    path: pathlib.Path | Piece,
    *,
    example: str,
    columns: Sequence[str] | None = None,
    bad: BadRows = None,
) -> Iterator[Row]:
    """Yields the rows of a file of JSON lines, Parquet or Arrow, or of a piece of one.

    Parquet and Arrow have a value for each key of each row: keys with null are removed from their rows, at any depth.

    Args:
      path: the file, or a piece of it.
      example: an example of a line, for error messages.
      columns: those that are read of Parquet and Arrow, which each row then has, perhaps with null; None for all.
      bad: collects rows of JSON lines that cannot be used; None: they are errors.

    Raises:
      DataError: the file is of another kind or malformed, or lacks a column.
    """
    piece = piece_of(path)
    check_rows(piece.path, example)
    if not piece.path.lower().endswith(tables.SUFFIXES):
        yield from row_files.json_rows(piece, example=example, bad=bad)
        return
    read = None if columns is None else dict.fromkeys(columns, "columns")
    for row in tables.rows(piece, read):
        if columns is None:
            content = _without_nulls(row.content)
        else:
            content = {key: _without_nulls(value) for key, value in row.content.items()}
        yield row._replace(content=content)


def check_rows(path: str | os.PathLike, example: str) -> None:
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


_RAISE = ", or raise max_document_bytes"


def _json_lines(
    piece: Piece, format: Format, metadata: Sequence[str], bad: BadRows
) -> Iterator[Row]:
    del metadata  # a line has all keys
    example, limit = f'{{"{format.text_keys[0]}": "..."}}', format.max_document_bytes
    return row_files.json_rows(piece, example=example, max_bytes=limit, remedy=_RAISE, bad=bad)


def _documents(
    name: str,
    piece: Piece,
    rows: Iterable[Row],
    format: Format,
    metadata: Sequence[str],
    bad: BadRows,
) -> Iterator[Document]:
    for row in rows:
        try:
            document = _document(name, row, format, metadata)
        except DataError as error:
            row_files.refuse(error, bad, piece.path, row.number, row.offset)
            continue
        yield document


def _document(name: str, row: Row, format: Format, metadata: Sequence[str]) -> Document:
    record, where = row.content, row.where
    id = f"{name}:{row.number}"
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
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    check_unicode(text, key, where)
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


def _text(piece: Piece, format: Format, name: str, bad: BadRows) -> Iterator[Document]:
    limit = format.max_document_bytes
    # A line that is a part of a document cannot be left out.
    bad = bad if format.document_per == "line" else None
    lines = row_files.lines(piece, limit, _RAISE, bad)
    if format.document_per == "file":
        yield Document(name, _joined(lines, piece.path, limit)[1])
    elif format.document_per == "line":
        for line in lines:
            yield Document(f"{name}:{line.number}", line.text.rstrip("\r\n"))
    else:
        for blank, group in itertools.groupby(lines, key=lambda line: not line.text.strip()):
            if not blank:
                first, text = _joined(group, piece.path, limit)
                yield Document(f"{name}:{first}", text)


def _joined(lines: Iterable[Line], path: str, limit: int) -> tuple[int | None, str]:
    """Returns the number of the first line and the text of all; raises DataError if it exceeds `limit` bytes."""
    text, size, first = io.StringIO(newline=""), 0, None
    for line in lines:
        first = line.number if first is None else first
        size += line.size
        if size > limit:
            raise DataError(
                f"{path}, line {line.number}: the document is longer than {limit:,} bytes. Set document_per to "
                "'paragraph' or 'line', divide the file, or raise max_document_bytes"
            )
        text.write(line.text)
    return first, text.getvalue()


def _table(piece: Piece, format: Format, metadata: Sequence[str], bad: BadRows) -> Iterator[Row]:
    del bad  # a value that Python does not have makes the column unreadable
    arguments = {key.partition(".")[0]: "the filter's key" for key in metadata}
    arguments |= {} if format.id_key is None else {format.id_key: "id_key"}
    arguments |= dict.fromkeys(format.text_keys, "text_key")
    return tables.rows(piece, arguments)
