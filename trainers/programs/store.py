"""A folder of stored programs, one file for each: written at once, checked when read, and bounded in size.

A file is `MAGIC`, the SHA-256 digest of all that follows it, the length of a header (8 bytes, little-endian), the header (JSON: the key
and the program's description), and the executable. The name of a file is the digest of its key.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import stat
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from espalier.trainers.programs.structures import Unstorable

SWITCH = "ESPALIER_PROGRAMS"
MAGIC = b"espalier program 1\n"
SUFFIX = ".program"
_DIGEST = 32
_LARGEST = 2**32  # bytes of a file that is read
_BOUND = 2**32  # bytes of all files, unless jax's own bound of its compiled programs is set
_log = logging.getLogger(__name__)
T = TypeVar("T")


class DamagedProgramError(Exception):
    """A file that is not what was written, or whose program cannot be loaded."""


class ForeignProgramError(Exception):
    """A file that another user owns or may write."""


def folder() -> pathlib.Path | None:
    """Returns the folder of programs beside jax's compiled ones; None if programs are not stored.

    They are with ESPALIER_PROGRAMS=1, if jax has a cache of compiled programs that is in no object store.
    """
    flags: Any = jax.config
    root = flags.jax_compilation_cache_dir
    if os.environ.get(SWITCH) != "1" or not flags.jax_enable_compilation_cache:
        return None
    return None if not root or "://" in root else pathlib.Path(root, "programs")


def digest(key: Any) -> str:
    """Returns the digest of a key in JSON types."""
    return hashlib.sha256(_json(key)).hexdigest()


def read(path: pathlib.Path, load: Callable[[Any, bytes], T]) -> T | None:
    """Returns `load(description, executable)` of a stored program; None, after one warning, if its file is not used.

    A damaged file is removed. One that another user owns or may write is left alone: it would run that user's code. The time
    of use, which orders files, is set.
    """
    try:
        data = _bytes(path)
        description, executable = _checked(data, path.stem)
        program = load(description, executable)
    except (FileNotFoundError, PermissionError):  # no program, or another user's
        return None
    except ForeignProgramError as error:
        _log.warning("The stored program %s is not used: %s.", path, error)
        return None
    except (DamagedProgramError, Unstorable, OSError, RecursionError) as error:
        _log.warning("The stored program %s is not used (%s); it is compiled again.", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return program


def _bytes(path: pathlib.Path) -> bytes:
    # A link is an error, and opening a pipe does not wait for its other end.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ForeignProgramError("another user owns it or may write it")
        if not stat.S_ISREG(status.st_mode):
            raise DamagedProgramError("it is no regular file")
        if status.st_size > _LARGEST:
            raise DamagedProgramError(f"it has more than {_LARGEST} bytes")
        return file.read()


def _checked(data: bytes, name: str) -> tuple[Any, bytes]:
    start = len(MAGIC) + _DIGEST
    if not data.startswith(MAGIC) or len(data) < start + 8:
        raise DamagedProgramError("it does not begin as a stored program")
    view = memoryview(data)
    if hashlib.sha256(view[start:]).digest() != data[len(MAGIC) : start]:
        raise DamagedProgramError("its checksum is wrong")
    length = int.from_bytes(data[start : start + 8], "little")
    begin, end = start + 8, start + 8 + length
    try:
        header = json.loads(data[begin:end])
        key, description = header["key"], header["program"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedProgramError("its header is no description") from error
    if digest(key) != name:
        raise DamagedProgramError("it is the program of another key")
    return description, data[end:]


def write(path: pathlib.Path, key: Any, description: Any, executable: bytes) -> None:
    """Writes a program and removes the files that were used least recently, beyond the bound; logs a file that cannot be written."""
    header = _json({"key": key, "program": description})
    rest = len(header).to_bytes(8, "little") + header + executable
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=f".partial{SUFFIX}")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + hashlib.sha256(rest).digest())
                file.write(rest)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise
        _bound(path)
    except OSError as error:
        _log.warning("The compiled program %s is not stored: %s", path, error)


def _bound(newest: pathlib.Path) -> None:
    """Removes programs that were used least recently, so that the rest has at most the bound's bytes."""
    flags: Any = jax.config
    most = flags.jax_compilation_cache_max_size
    left = most if most >= 0 else _BOUND
    files = []
    for path in newest.parent.glob(f"*{SUFFIX}"):  # nobody else's files
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            status = path.lstat()
            files.append((path != newest, -status.st_mtime, status.st_size, path))
    for other, _, size, path in sorted(files):
        left -= size
        if left < 0 and other:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
