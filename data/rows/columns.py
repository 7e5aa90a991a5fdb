"""Rows whose keys are read from columns of other names, as data sets of other sources have them.

    {"prompt": "question", "completion": "answer"}
    {"prompt": ["instruction", "input"], "completion": "output"}

With columns, a row has these keys and no others. Texts of several columns are joined by blank lines, without the empty ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.data.pieces import Piece
from espalier.data.text import documents, row_files, tables
from espalier.data.text.documents import DataError
from espalier.data.text.row_files import BadRows, Row

Columns = Mapping[str, str | Sequence[str]]  # key of a row -> its column, or several


def check(name: str, columns: Columns | None) -> None:
    """Raises ValueError, which names a task, if columns are of another form, or two keys have one column."""
    if columns is None:
        return
    every = _names(columns) if all(map(_is_form, columns.values())) else []
    if not every:
        raise ValueError(
            f"{name}: columns is {columns!r}; write {{'key of a row': 'column of the files', ...}}, with a list of columns "
            "for texts that are joined"
        )
    if twice := sorted({column for column in every if every.count(column) > 1}):
        raise ValueError(
            f"{name}: columns maps {', '.join(map(repr, twice))} more than once ({dict(columns)}); a column becomes one key"
        )


def settings(columns: Columns | None) -> dict[str, Any]:
    """Returns the columns for the digest of a source; nothing without any, so that older caches remain valid."""
    return {} if columns is None else {"columns": sorted(map(list, columns.items()))}


def read(
    piece: Piece, *, example: str, columns: Columns | None, bad: BadRows = None
) -> Iterator[Row]:
    """Yields the rows of a piece of a file, see `documents.read_rows`; with columns None, as they are.

    Raises:
      DataError: the file is malformed, has no such column, or a column to be joined holds other values than texts.
    """
    if columns is None:
        yield from documents.read_rows(piece, example=example, bad=bad)
        return
    for row in documents.read_rows(piece, example=example, columns=_names(columns), bad=bad):
        try:
            chosen = {key: _value(row.content, key, columns[key], row.where) for key in columns}
        except DataError as error:
            row_files.refuse(error, bad, piece.path, row.number, row.offset)
            continue
        content = {key: value for key, value in chosen.items() if value is not None}
        yield row._replace(content=content)


def _value(row: Mapping[str, Any], key: str, columns: str | Sequence[str], where: str) -> Any:
    if isinstance(columns, str):
        return tables.value_of(row, columns, "columns", where)
    texts = [tables.value_of(row, column, "columns", where) for column in columns]
    for column, text in zip(columns, texts, strict=True):
        if not isinstance(text, str | None):
            raise DataError(
                f"{where}: {column!r} is a {type(text).__name__}; only texts are joined to {key!r}"
            )
    return "\n\n".join(filter(None, texts)) if any(text is not None for text in texts) else None


def _is_form(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, Sequence) and bool(value) and all(isinstance(x, str) for x in value)
    )


def _names(columns: Columns) -> list[str]:
    each = ([value] if isinstance(value, str) else value for value in columns.values())
    return [column for names in each for column in names]
