"""Rows of files of columns, Parquet and Arrow, and the pieces of such files."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from espalier.data import pieces
from espalier.data.pieces import Piece
from espalier.data.text import arrow_files
from espalier.data.text.row_files import DataError, Row

SUFFIXES = (".parquet", ".arrow")
_BATCH_BYTES = 64 << 20  # of a file's values in memory


def divided(path: str, size: int) -> tuple[Piece, ...]:
    """Returns the pieces of a file of `size` bytes: neighbouring row groups or record batches, about `pieces.BLOCK_BYTES` each.

    Raises:
      DataError: the file is not readable.
    """
    if size <= pieces.BLOCK_BYTES:
        return (Piece(path, size=size),)
    with _readable(pathlib.Path(path)):
        groups = _group_sizes(path)
    found: list[Piece] = []
    total = max(sum(values for _, values in groups), 1)
    begin, first, rows_before, values_before, done = 0, 1, 0, 0, 0
    for end, (rows_in, values) in enumerate(groups, start=1):
        rows_before, values_before = rows_before + rows_in, values_before + values
        stored = size * values_before // total  # about where the group ends in the file
        if stored - done >= pieces.BLOCK_BYTES or end == len(groups):
            found.append(Piece(path, begin, end, first, stored - done))
            begin, first, done = end, rows_before + 1, stored
    return tuple(found) if len(found) > 1 else (Piece(path, size=size),)


def _group_sizes(path: str) -> list[tuple[int, int]]:
    """Returns (rows, bytes of values) of each row group or record batch."""
    if path.lower().endswith(".arrow"):
        return arrow_files.batch_sizes(path)
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path}: not a readable {path.suffix[1:].capitalize()} file ({error}). It is truncated or damaged; copy or write "
            "it again"
        ) from None


def rows(piece: Piece, arguments: Mapping[str, str] | None) -> Iterator[Row]:
    """Yields the rows of a file of columns or of a piece of it: of the columns that arguments name, or of all for None."""
    path = pathlib.Path(piece.path)
    is_parquet = path.suffix.lower() == ".parquet"
    number = piece.first - 1
    with _readable(path):
        for batch, decoders in (_parquet if is_parquet else _arrow)(piece, arguments):
            for record in _rows(batch, path, number, decoders):
                yield Row(number, f"{path}, row {number}", record)
                number += 1


_Batches = Iterator[tuple[Any, Mapping[str, Callable[[Any], Any]]]]  # with decoders of columns


def _parquet(piece: Piece, arguments: Mapping[str, str] | None) -> _Batches:
    import pyarrow
    from pyarrow import parquet

    path = pathlib.Path(piece.path)
    texts = [
        field.name for field in parquet.read_schema(path) if pyarrow.types.is_string(field.type)
    ]
    # A value that is written once and used in many rows is also in memory once.
    with parquet.ParquetFile(path, read_dictionary=texts) as file:
        columns = _columns(file.schema_arrow.names, arguments, path)
        size = _rows_at_once(file.metadata)
        groups = range(piece.begin, file.num_row_groups if piece.end is None else piece.end)
        for batch in file.iter_batches(size, list(groups), columns):
            yield batch, {}


def _arrow(piece: Piece, arguments: Mapping[str, str] | None) -> _Batches:
    path = pathlib.Path(piece.path)
    with arrow_files.opened(path) as file:
        columns = _columns(file.schema.names, arguments, path)
        if found := arrow_files.media(file.schema, columns):
            raise DataError(
                f"{path}: {', '.join(f'{name!r} holds {kind}' for name, kind in found.items())}, of which no text is "
                f"made. Remove the column (Dataset.remove_columns({list(found)})), or name the others in columns"
            )
        described = arrow_files.features(file.schema)
        decoders = {
            name: decode for name in columns if (decode := arrow_files.decoder(described.get(name)))
        }
        for whole in file.batches(piece.begin, piece.end):
            whole.validate(full=True)  # values of damaged offsets would be read outside of the file
            size = max(whole.nbytes // max(whole.num_rows, 1), 1)
            at_once = min(1024, max(1, _BATCH_BYTES // size))
            for first in range(0, whole.num_rows, at_once):
                yield whole.slice(first, at_once).select(columns), decoders


def _columns(
    names: Sequence[str], arguments: Mapping[str, str] | None, path: pathlib.Path
) -> list[str]:
    """Returns the columns to read; raises DataError if one is not there, or twice."""
    for key, argument in (arguments or {}).items():
        value_of(dict.fromkeys(names), key, argument, f"{path}, columns")
    columns = list(names if arguments is None else arguments)
    for key in columns:
        if names.count(key) > 1:
            raise DataError(
                f"{path} has {names.count(key)} columns {key!r}: rename or drop all but one"
            )
    return columns


def _rows_at_once(metadata: Any) -> int:
    """Returns the number of rows of a Parquet file whose decompressed values take about `_BATCH_BYTES`."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return min(1024, max(1, _BATCH_BYTES // max(largest, 1)))


def _rows(
    batch: Any,
    path: pathlib.Path,
    first: int,
    decoders: Mapping[str, Callable[[Any], Any]] = MappingProxyType({}),
) -> Iterator[dict[str, Any]]:
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        where = f"{path}, rows {first} to {first + len(batch) - 1}"
        try:
            values = _column(column)
            columns.append(list(map(decoders[name], values)) if name in decoders else values)
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
    for row in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def _column(column: Any) -> list[Any]:
    """Returns the values of a column; equal ones of a dictionary are one object."""
    import pyarrow
    from pyarrow import compute

    if not isinstance(column, pyarrow.DictionaryArray):
        return column.to_pylist()
    if not pyarrow.types.is_string(column.dictionary.type):
        return column.dictionary_decode().to_pylist()
    longest = compute.max(compute.binary_length(column.dictionary)).as_py() or 0
    if longest * len(column) <= _BATCH_BYTES:
        return column.dictionary_decode().to_pylist()
    used = column.indices.drop_null().unique()
    values = dict(zip(used.to_pylist(), column.dictionary.take(used).to_pylist(), strict=True))
    return [values.get(index) for index in column.indices.to_pylist()]


_CHATS = "; conversations and completions are learnt by runs/finetune.gin over data/chat.gin"


def value_of(record: Mapping[str, Any], key: str, argument: str, where: str) -> Any:
    """Returns the value of a key; raises DataError, which names the keys that are there and the argument to correct."""
    if key not in record:
        raise DataError(
            f"{where}: no key {key!r}; present are {', '.join(map(repr, record)) or 'none'}. Correct "
            f"{argument}{_CHATS if {'messages', 'completion'} & record.keys() else ''}"
        )
    return record[key]
