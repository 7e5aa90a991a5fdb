"""Files of rows that commands read and write: JSON lines, one object each."""

import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from data.text import documents


class RowFileError(OSError):
    """A file of rows that is not there or cannot be written."""


def read(path: str, *, example: str, flag: str = "inputs") -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of every line; the place is for errors, as is the flag that names the file.

    Raises:
      RowFileError: there is no such file.
      DataError: a malformed line, named by file and number.
    """
    if not os.path.isfile(path):
        raise RowFileError(f"--{flag}={path}: there is no such file.")
    lines = documents.read_json_lines(pathlib.Path(path), example=example)
    return [(f"{path}, line {number}", row) for number, row in lines]


def check_output(path: str) -> None:
    """Raises RowFileError, before any work, where `write` could not."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise RowFileError(f"--output={path}: there is no folder {folder}. Create it first.")
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise RowFileError(f"--output={path} cannot be written. Choose another file.")


def write(path: str, rows: Iterable[Mapping[str, Any]], *, writer: bool = True) -> None:
    """Writes rows as they are made to `path`.partial, where they stay if the others are never made.

    Args:
      path: the file, which is there once all rows are.
      rows: made one by one, by all processes together.
      writer: whether this process writes; the others only make them.
    """
    made = iter(rows)
    first = list(itertools.islice(made, 1))  # What fails at once leaves all files as they were.
    if not writer:
        for _ in made:
            pass
        return
    partial = f"{path}.partial"
    # Half of a surrogate pair, which UTF-8 lacks, becomes the escape that JSON has for it. Each line is
    # on its way to the disk when it ends.
    with open(partial, "w", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
        for row in itertools.chain(first, made):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)
