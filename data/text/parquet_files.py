"""Rows of Parquet files, and the pieces of such files: ranges of row groups."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from espalier.data import pieces
from espalier.data.pieces import Piece
from espalier.data.text.row_files import DataError, Row

_BATCH_BYTES = 64 << 20  # of a file's values in memory


def divided(path: str, size: int) -> tuple[Piece, ...]:
    """Returns the pieces of a file of `size` bytes: neighbouring row groups of at least `pieces.BLOCK_BYTES` together.

    Raises:
      DataError: the file is not readable.
    """
    if size <= pieces.BLOCK_BYTES:
        return (Piece(path, size=size),)
    from pyarrow import parquet

    with _readable(path), parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        rows = [group.num_rows for group in groups]
        values = [group.total_byte_size for group in groups]  # decompressed
    found: list[Piece] = []
    begin = first = before = done = 0
    total = max(sum(values), 1)
    for end in range(1, len(groups) + 1):
        stored = size * sum(values[:end]) // total  # about where the group ends
        if stored - done >= pieces.BLOCK_BYTES or end == len(groups):
            found.append(Piece(path, begin, end, first + 1, stored - done))
            begin, done, first = end, stored, first + sum(rows[before:end])
            before = end
    return tuple(found) if len(found) > 1 else (Piece(path, size=size),)


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({error}). It is truncated or damaged; copy or write "
            "it again"
        ) from None


def rows(piece: Piece, arguments: Mapping[str, str] | None) -> Iterator[Row]:
    """Yields the rows of a file, or of a range of its row groups.

    Args:
      piece: the file or a part of it.
      arguments: column to read -> the argument that names it, for errors; None for all columns.

    Raises:
      DataError: a column is missing or doubled, a value is not one of Python's, or the file is not readable.
    """
    import pyarrow
    from pyarrow import parquet

    path = pathlib.Path(piece.path)
    with _readable(piece.path):
        texts = [
            field.name for field in parquet.read_schema(path) if pyarrow.types.is_string(field.type)
        ]
        # A value that is written once and used in many rows is also in memory once.
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            names = file.schema_arrow.names
            for key, argument in (arguments or {}).items():
                value_of(dict.fromkeys(names), key, argument, f"{path}, columns")
            for key in names if arguments is None else arguments:
                if names.count(key) > 1:
                    raise DataError(
                        f"{path} has {names.count(key)} columns {key!r}: rename or drop all but one"
                    )
            number = piece.first - 1
            columns = None if arguments is None else list(arguments)
            groups = range(piece.begin, file.num_row_groups if piece.end is None else piece.end)
            for batch in file.iter_batches(_rows_at_once(file.metadata), list(groups), columns):
                for record in _rows(batch, path, number):
                    yield Row(number, f"{path}, row {number}", record)
                    number += 1


_CHATS = "; conversations and completions are learnt by runs/finetune.gin over data/chat.gin"


def value_of(record: Mapping[str, Any], key: str, argument: str, where: str) -> Any:
    """Returns the value of a key; raises DataError, with place and the argument to correct, if there is none."""
    if key not in record:
        raise DataError(
            f"{where}: no key {key!r}; present are {', '.join(map(repr, record)) or 'none'}. Correct "
            f"{argument}{_CHATS if {'messages', 'completion'} & record.keys() else ''}"
        )
    return record[key]


def _rows_at_once(metadata: Any) -> int:
    """Returns the number of rows of a Parquet file whose decompressed values take about `_BATCH_BYTES`."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return min(1024, max(1, _BATCH_BYTES // max(largest, 1)))


def _rows(batch: Any, path: pathlib.Path, first: int) -> Iterator[dict[str, Any]]:
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        where = f"{path}, rows {first} to {first + len(batch) - 1}"
        try:
            columns.append(_column(column))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: not UTF-8 at byte offset {error.start} of a value: {error.reason}. Write the "
                "column again as UTF-8 strings"
            ) from None
        except (OverflowError, ValueError, LookupError) as error:  # a date, a time or a zone
            raise DataError(
                f"{where}: {name!r} has a value of {column.type} that Python does not have ({error}). Write "
                "the column again as strings"
            ) from None
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def _column(column: Any) -> list[Any]:
    """Returns the values of a column; equal ones of a dictionary are one object."""
    import pyarrow
    from pyarrow import compute

    if not isinstance(column, pyarrow.DictionaryArray):
        return column.to_pylist()
    longest = compute.max(compute.binary_length(column.dictionary)).as_py() or 0
    if longest * len(column) <= _BATCH_BYTES:
        return column.dictionary_decode().to_pylist()
    used = column.indices.drop_null().unique()
    values = dict(zip(used.to_pylist(), column.dictionary.take(used).to_pylist(), strict=True))
    return [values.get(index) for index in column.indices.to_pylist()]
