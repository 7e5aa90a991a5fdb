"""Rows of files of columns, Parquet and Arrow, and the pieces of such files."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO

from espalier.common.storage import paths, ranges
from espalier.data import pieces
from espalier.data.pieces import Piece
from espalier.data.text import arrow_files
from espalier.data.text.arrow_files import Group
from espalier.data.text.row_files import DataError, Row

SUFFIXES = (".parquet", ".arrow")
_BATCH_BYTES = 64 << 20  # of a file's values in memory


def divided(path: str, size: int, groups: Sequence[Group]) -> tuple[Piece, ...]:
    """Returns the pieces of a file of `size` bytes: neighbouring groups, about `pieces.BLOCK_BYTES` each."""
    found: list[Piece] = []
    total = max(sum(group.values for group in groups), 1)
    begin, first, rows_before, values_before, done = 0, 1, 0, 0, 0
    ends = [*(group.begin for group in groups[1:]), None]
    for group, end in zip(groups, ends, strict=False):  # a file without groups has one end
        rows_before, values_before = rows_before + group.rows, values_before + group.values
        stored = size * values_before // total  # about where the group ends in the file
        if end is None or stored - done >= pieces.BLOCK_BYTES:
            found.append(Piece(path, begin, end, first, stored - done))
            begin, first, done = end or 0, rows_before + 1, stored
    return tuple(found) if len(found) > 1 else (Piece(path, size=size),)


def groups(piece: Piece) -> list[Group]:
    """Returns the row groups or record batches of the file of a piece; raises DataError if it is not readable."""
    with _opened(piece) as source:
        if _is_parquet(piece):
            from pyarrow import parquet

            with parquet.ParquetFile(source) as file:
                each = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                return [Group(i, x.num_rows, x.total_byte_size) for i, x in enumerate(each)]
        with arrow_files.opened(source) as file:
            return file.groups()


def _is_parquet(piece: Piece) -> bool:
    return piece.path.lower().endswith(".parquet")


@contextlib.contextmanager
def _opened(piece: Piece) -> Iterator[str | BinaryIO]:
    """Yields what Arrow reads the file of a piece from: its path, or an open object of a store."""
    import pyarrow

    with contextlib.ExitStack() as stack:
        source: str | BinaryIO = piece.path
        if paths.is_remote(piece.path):
            source = stack.enter_context(ranges.opened(piece.path, version=piece.version))
        try:
            if source is piece.path:
                stack.enter_context(ranges.opened(piece.path, version=piece.version))
            yield source
        except paths.StoreError:
            raise
        except (pyarrow.ArrowInvalid, OSError) as error:
            kind = "Parquet" if _is_parquet(piece) else "Arrow"
            raise DataError(
                f"{piece.path}: not a readable {kind} file ({error}). It is truncated or damaged; copy or write it again"
            ) from None


def rows(piece: Piece, arguments: Mapping[str, str] | None) -> Iterator[Row]:
    """Yields the rows of a columnar file or of a piece of it, with the columns that are named; None for all columns."""
    number = piece.first - 1
    with _opened(piece) as source:
        batches = (_parquet if _is_parquet(piece) else _arrow)(source, piece, arguments)
        for batch, decoders in batches:
            for record in _rows(batch, piece.path, number, decoders):
                yield Row(number, f"{piece.path}, row {number}", record)
                number += 1


_Batches = Iterator[tuple[Any, Mapping[str, Callable[[Any], Any]]]]  # with decoders of columns


def _parquet(source: str | BinaryIO, piece: Piece, arguments: Mapping[str, str] | None) -> _Batches:
    import pyarrow
    from pyarrow import parquet

    texts = [
        field.name for field in parquet.read_schema(source) if pyarrow.types.is_string(field.type)
    ]
    # A value that is written once and used in many rows is also in memory once.
    with parquet.ParquetFile(source, read_dictionary=texts) as file:
        columns = _columns(file.schema_arrow.names, arguments, piece.path)
        size = _rows_at_once(file.metadata)
        groups = range(piece.begin, file.num_row_groups if piece.end is None else piece.end)
        for batch in file.iter_batches(size, list(groups), columns):
            yield batch, {}


def _arrow(source: str | BinaryIO, piece: Piece, arguments: Mapping[str, str] | None) -> _Batches:
    with arrow_files.opened(source) as file:
        columns = _columns(file.schema.names, arguments, piece.path)
        if found := arrow_files.media(file.schema, columns):
            raise DataError(
                f"{piece.path}: {', '.join(f'{name!r} holds {kind}' for name, kind in found.items())}, of which no text is "
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


def _columns(names: Sequence[str], arguments: Mapping[str, str] | None, path: str) -> list[str]:
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
    path: str,
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


_SETTINGS = {"text_key": "text_key (TEXT_KEY)", "id_key": "id_key (ID_KEY)"}  # with their macros
_CHATS = "; conversations and completions are learnt by runs/finetune.gin over data/chat.gin"


def value_of(record: Mapping[str, Any], key: str, argument: str, where: str) -> Any:
    """Returns the value of a key; raises DataError, which names the keys that are there and the argument to correct."""
    if key not in record:
        raise DataError(
            f"{where}: no key {key!r}; present are {', '.join(map(repr, record)) or 'none'}. Correct "
            f"{_SETTINGS.get(argument, argument)}{_CHATS if {'messages', 'completion'} & record.keys() else ''}"
        )
    return record[key]
