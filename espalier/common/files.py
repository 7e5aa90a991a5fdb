"""Files of this machine: replaced in one step, appended to, locked, and JSON.

A file is replaced by renaming: a reader, and a process that starts after a kill, see the old content or the new one. Whether
that holds after a power cut too is a choice, `synced`: the content is then on the disk before the old one is gone, at the
price of a wait for the disk. Without it a power cut can leave an empty file, which suits what can be made again.

Outputs that users name may be links, devices or addresses: espalier/common/storage/output_files.py.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import platform
import secrets
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

_log = logging.getLogger(__name__)


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class OverwrittenError(OSError):
    """Another process has begun to write the same file."""


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike, *, synced: bool, shared: bool = False, keep: bool = False
) -> Iterator[BinaryIO]:
    """Context manager: a new file, which replaces `path` at the end; an error leaves the old one.

    Args:
      path: the file.
      synced: whether a power cut leaves the old content or the new one, see the module.
      shared: whether several processes may write the file at the same time: the new file then has a name of its own, which
        a kill leaves behind. Otherwise it is `path`.partial, which the next start replaces.
      keep: whether an error leaves the new file, with what was written.

    Raises:
      OverwrittenError: another process has begun to write `path`.partial.
    """
    partial = f"{os.fspath(path)}{f'.{secrets.token_hex(4)}' if shared else ''}.partial"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)  # of an earlier start; of a link, the link
    try:
        with open(partial, "xb") as file:  # never through a link
            yield file
            file.flush()
            if synced:
                os.fsync(file.fileno())
            if not os.path.lexists(partial) or not os.path.samestat(
                os.lstat(partial), os.fstat(file.fileno())
            ):
                raise OverwrittenError(f"{path}: another process has begun to write it.")
        os.replace(partial, path)
    except OverwrittenError:  # `partial` is of the other process
        raise
    except BaseException:
        if not keep:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
        raise


def write(
    path: str | os.PathLike, content: str | bytes, *, synced: bool, shared: bool = False
) -> None:
    """Replaces a file, texts in UTF-8; see `replacing`."""
    with replacing(path, synced=synced, shared=shared) as file:
        file.write(_encoded(content))


def append(path: str | os.PathLike, content: str | bytes, *, synced: bool) -> None:
    """Adds to the end of a file, which is created if it is missing.

    Args:
      path: the file.
      content: a text, in UTF-8, or bytes; a kill can cut it short.
      synced: whether it is on the disk when this returns.
    """
    with open(path, "ab") as file:
        file.write(_encoded(content))
        if synced:
            file.flush()
            os.fsync(file.fileno())


def is_within(target: pathlib.Path, folder: pathlib.Path) -> bool:
    """Returns whether a path without links is in the folder of a checkpoint, also without links.

    In the cache of Hugging Face, the files of a checkpoint are links to blobs.
    """
    roots = [folder]
    if folder.parent.name == "snapshots":
        roots.append(folder.parent.parent / "blobs")
    return any(target.is_relative_to(root) for root in roots)


def sync(path: str | os.PathLike) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_bytes(value: Any, *, end: str = "", **style: Any) -> bytes:
    """Returns JSON in UTF-8.

    Args:
      value: the value.
      end: what follows it, such as a line break.
      **style: arguments of `json.dumps`; by default one space of indentation and letters of all scripts as they are. A lone
        surrogate, which UTF-8 cannot encode, becomes JSON's escape for it.

    Raises:
      ValueError: with `allow_nan=False`, for NaN and infinities.
    """
    text = json.dumps(value, **{"indent": 1, "ensure_ascii": False, **style}) + end
    return text.encode("utf-8", "backslashreplace")


def write_json(
    path: str | os.PathLike, value: Any, *, synced: bool, shared: bool = False, **style: Any
) -> None:
    """Replaces a file by JSON; see `replacing` and `json_bytes`."""
    write(path, json_bytes(value, **style), synced=synced, shared=shared)


def json_object(line: bytes) -> dict[str, Any] | None:
    """Returns the JSON object in a line, or None if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # text that is not UTF-8 is a ValueError too
        return None
    return row if isinstance(row, dict) else None


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def lock(file: IO[Any], *, wait: bool = False) -> None:
    """Locks an open file until it is closed.

    Args:
      file: the file; on NFS, opened to be written.
      wait: whether to wait for another process that holds the lock.

    Raises:
      BlockingIOError: another process holds the lock.
      OSError: the file system has no locks.
    """
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def lock_folder(path: str | os.PathLike) -> IO[str]:
    """Creates a folder if it is missing, and locks it until the returned file is closed.

    On a file system without locks, a warning says so.

    Raises:
      BlockingIOError: another process holds the lock; the message is its name.
    """
    os.makedirs(path, exist_ok=True)
    file = open(os.path.join(path, ".lock"), "a+", encoding="utf-8")  # noqa: SIM115 (stays open to hold the lock)
    try:
        lock(file)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise BlockingIOError(holder) from None
    except OSError as error:
        _log.warning(
            "%s cannot be locked (%s): nothing prevents that two processes use this directory at once.",
            path,
            error.strerror,
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file
