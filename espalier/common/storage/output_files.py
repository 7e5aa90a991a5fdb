"""Files that users name for results: written whole or not at all, also through links, to devices and to object stores.

A result replaces a file only once it is complete; until then it is in FILE.partial. Renaming would turn a device, a pipe or
a link into a file. A link is therefore followed to its file, and a device, a pipe or /dev/stdout is written to directly.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from espalier.common import files
from espalier.common.storage import mirror, paths


class OutputError(OSError):
    """An output that cannot be written."""


def check(path: str | os.PathLike) -> None:
    """Raises OutputError, with the remedy, if an output cannot be written; StoreError for such an address."""
    if paths.is_remote(path):
        paths.names(os.fspath(path))
        return
    target = _target(path)
    if isinstance(target, str) and is_stream(target):
        writable = os.access(target, os.W_OK)
    elif isinstance(target, str):
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            raise OutputError(f"there is no folder {folder}. Create it first.")
        writable = os.access(folder, os.W_OK)
    else:
        writable = True
    if not writable:
        raise OutputError("it cannot be written. Choose another file.")


def is_stream(path: str | os.PathLike) -> bool:
    """Returns whether a path is a device or a pipe: what is written there replaces nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


@contextlib.contextmanager
def opened(path: str | os.PathLike, *, keep: bool = True) -> Iterator[BinaryIO]:
    """Opens an output, which replaces what is there at the end.

    Args:
      path: the output.
      keep: whether FILE.partial stays after an error, with what was written. Without it several processes may write the
        file at the same time.

    Raises:
      OutputError: the output cannot be written, or another process has begun to write it.
      StoreError: an address that cannot be written.
    """
    if paths.is_remote(path):
        address = os.fspath(path)
        os.makedirs(mirror.folder(), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=mirror.folder()) as folder:
            copy = os.path.join(folder, address.rpartition("/")[2])
            with open(copy, "wb") as file:
                yield file
            mirror.put(copy, address)
        return
    target = _target(path)
    if isinstance(target, int) or is_stream(target):
        with open(target, "wb", closefd=isinstance(target, str)) as file:
            yield file
        return
    try:  # a result is worth the wait for the disk
        with files.replacing(target, synced=True, shared=not keep, keep=keep) as file:
            yield file
    except files.OverwrittenError:
        raise OutputError(f"{path}: another process has begun to write it. Start again.") from None


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a whole output, texts in UTF-8; raises as `opened`."""
    with opened(path, keep=False) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _target(path: str | os.PathLike) -> str | int:
    """Returns the path behind all links, or the number of an open file of this process, such as 1 of /dev/stdout.

    Raises:
      OutputError: a folder, a loop of links, or anything else that cannot be written.
    """
    path = os.path.abspath(path)
    try:
        mode = os.stat(
            path
        ).st_mode  # The system refuses links that others planted, as realpath does not.
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except OSError as error:
        raise OutputError(f"{error.strerror}. Choose another file.") from None
    if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        kind = "a folder" if stat.S_ISDIR(mode) else "no file"
        raise OutputError(f"it cannot be written, since it is {kind}. Choose another file.")
    own = f"/proc/{os.getpid()}/fd"
    while os.path.islink(path):
        folder, name = os.path.split(path)
        if os.path.realpath(folder) == own:
            return int(name)
        path = os.path.join(folder, os.readlink(path))
    return os.path.realpath(path)
