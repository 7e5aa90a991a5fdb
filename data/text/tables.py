"""Rows of files of columns: Parquet and Arrow."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from espalier.data.text import arrow_files
from espalier.data.text.data_error import DataError

SUFFIXES = (".parquet", ".arrow")
Record = tuple[int, str, dict[str, Any]]  # number, place for errors, content
_BATCH_BYTES = 64 << 20  # of a file's values in memory


def rows(path: pathlib.Path, arguments: Mapping[str, str] | None) -> Iterator[Record]:
    """Yields the rows of a file of columns: of the columns that arguments name, or of all columns for None."""
    import pyarrow

    kind = path.suffix.lower()
    try:
        yield from (_parquet_rows if kind == ".parquet" else _arrow_rows)(path, arguments)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path}: not a readable {kind[1:].capitalize()} file ({error}). It is truncated or damaged; copy or write "
            "it again"
        ) from None


def _parquet_rows(path: pathlib.Path, arguments: Mapping[str, str] | None) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    texts = [
        field.name for field in parquet.read_schema(path) if pyarrow.types.is_string(field.type)
    ]
    # A value that is written once and used in many rows is also in memory once.
    with parquet.ParquetFile(path, read_dictionary=texts) as file:
        columns = _columns(file.schema_arrow.names, arguments, path)
        number = 0
        size = _rows_at_once(file.metadata)
        for batch in file.iter_batches(batch_size=size, columns=columns):
            for record in _rows(batch, path, number):
                yield number, f"{path}, row {number}", record
                number += 1


def _arrow_rows(path: pathlib.Path, arguments: Mapping[str, str] | None) -> Iterator[Record]:
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
        number = 0
        for whole in file.batches():
            whole.validate(full=True)  # values of damaged offsets would be read outside of the file
            size = max(whole.nbytes // max(whole.num_rows, 1), 1)
            at_once = min(1024, max(1, _BATCH_BYTES // size))
            for first in range(0, whole.num_rows, at_once):
                batch = whole.slice(first, at_once).select(columns)
                for record in _rows(batch, path, number, decoders):
                    yield number, f"{path}, row {number}", record
                    number += 1


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
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


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
