"""Files of rows that commands read and write: JSON lines, one object each."""

import contextlib
import itertools
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Self

from espalier.common import files
from espalier.common.storage import mirror, output_files, paths
from espalier.data.text import documents

_log = logging.getLogger(__name__)


class RowFileError(OSError):
    """A file of rows that does not exist, cannot be written, or cannot be continued."""


def local(path: str, flag: str) -> pathlib.Path:
    """Returns the file that a flag names, or for an address a copy; raises RowFileError if there is none."""
    try:
        file = mirror.local(path)
    except FileNotFoundError:
        file = ""
    if not os.path.isfile(file):
        raise RowFileError(f"--{flag}={path}: there is no such file.")
    return pathlib.Path(file)


def digest(path: str, flag: str) -> str:
    """Returns the SHA-256 of a file that a flag names."""
    return files.sha256(local(path, flag))


def read(path: str, *, example: str, flag: str = "inputs") -> list[tuple[str, dict[str, Any]]]:
    """Returns (place, row) of every line; the place, and the flag that names the file, are for errors.

    Raises:
      RowFileError: there is no such file.
      DataError: a malformed line, named by file and number.
    """
    lines = documents.read_json_lines(local(path, flag), example=example)
    return [(f"{path}, line {number}", row) for number, row in lines]


def check_output(
    path: str | None,
    flag: str = "output",
    *,
    compressed: bool = False,
    others: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Raises RowFileError if the file that a flag names cannot be written; called before any work.

    Args:
      path: the file; None for none.
      flag: name of the flag.
      compressed: whether a file named .gz or .zst is written compressed, see `write`.
      others: files of other flags, which must not be overwritten, by flag.
    """
    if not path:
        return
    try:
        output_files.check(path)
    except output_files.OutputError as error:
        raise RowFileError(f"--{flag}={path}: {error}") from None
    if not compressed and path.lower().endswith(documents.COMPRESSED):
        raise RowFileError(
            f"--{flag}={path} is written uncompressed. Choose a name without {pathlib.Path(path).suffix}."
        )
    for other, taken in others.items():
        if taken and not output_files.is_stream(path) and _is_same(path, taken):
            raise RowFileError(
                f"--{flag}={path} is the file of --{other}, which would be overwritten. Choose another file."
            )


def _is_same(path: str, other: str) -> bool:
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return os.path.realpath(path) == os.path.realpath(other)


def check_folder(path: str, flag: str = "out") -> None:
    """Raises RowFileError if files cannot be written to the folder that a flag names; called before any work.

    Raises StoreError for an address that cannot be reached.
    """
    if paths.is_remote(path):
        paths.names(path)
        return
    nearest = os.path.abspath(path)
    while not os.path.lexists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest):
        raise RowFileError(f"--{flag}={path}: {nearest} is not a folder. Choose another folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RowFileError(f"--{flag}={path}: {nearest} cannot be written. Choose another folder.")


def write(path: str, rows: Iterable[Mapping[str, Any]], *, writer: bool = True) -> None:
    """Writes each row to `path`.partial as soon as it is computed, and replaces `path` by that file after the last.

    A device or a pipe is written to directly. A file named .gz or .zst is compressed; rows may then wait in memory before
    they are written. All processes compute the rows together; only the `writer` writes them.
    """
    iterator = iter(rows)
    first = list(itertools.islice(iterator, 1))  # An error in the first row changes no file.
    if not writer:
        for _ in iterator:
            pass
        return
    write_lines(path, map(line, itertools.chain(first, iterator)))


def write_lines(path: str, lines: Iterable[bytes]) -> None:
    """Writes blocks of whole lines as `write` writes rows."""
    with output_files.opened(path) as whole, documents.compressed(whole, path) as file:
        for block in lines:
            file.write(block)
            if file is whole:
                file.flush()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a value as a JSON file, whole or not at all; raises ValueError for NaN and infinities."""
    output_files.write(path, files.json_bytes(value, indent=2, end="\n", allow_nan=False))


def line(row: Any) -> bytes:
    """Returns a row as the line of a file."""
    return files.json_bytes(row, indent=None, end="\n")


class ResumedRows:
    """A file of rows that a command appends to, and continues after a stop; made by `opened`.

    Attributes:
      rows: (place, row) of the rows of earlier starts; the place is for errors.
    """

    def __init__(self, path: str, file: Any, *, writer: bool, sync: bool):
        self._file, self._sync = file, sync
        self.rows: list[tuple[str, dict[str, Any]]] = []
        size = 0
        for number, text in enumerate(file, 1):
            place = f"{path}, line {number}"
            row = files.json_object(text)
            cut = not text.endswith(b"\n")
            # A stop cuts a row short. A file of something else that ends without a line break is left alone.
            if cut and text.startswith(b"{") and (row is None or number > 1):
                break
            if cut or row is None:
                problem = (
                    "is not a JSON object" if row is None else "does not end with a line break"
                )
                raise RowFileError(
                    f"{place} {problem}: delete the line to make the row again, or give another path."
                )
            size += len(text)
            self.rows.append((place, row))
        if writer:
            file.truncate(size)
            file.seek(size)

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, path: str | os.PathLike, *, writer: bool = True, sync: bool = False
    ) -> Iterator[Self]:
        """Opens or creates a file of rows; the `writer` locks it to append rows, other processes only read.

        With `sync`, each row is on the disk before `add` returns, for rows that took long.

        Raises:
          RowFileError: a device or a folder, another process writes the file, or a line is damaged.
        """
        path = os.fspath(path)
        if os.path.exists(path) and not os.path.isfile(path):
            raise RowFileError(
                f"{path} is no file, so rows cannot be continued there: give another path."
            )
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            try:
                if writer:
                    files.lock(file)
            except BlockingIOError:
                raise RowFileError(
                    f"{path}: another process writes it. Wait for that one, or give another path."
                ) from None
            except OSError as error:  # a file system without locks
                _log.warning("%s cannot be locked (%s): start one process at a time.", path, error)
            yield cls(path, file, writer=writer, sync=sync)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row and flushes it."""
        self._file.write(line(row))
        self._file.flush()
        if self._sync:
            os.fsync(self._file.fileno())


resumed = ResumedRows.opened
