"""Locks of directories, so that only one process works in a run or a sweep."""

import fcntl
import os
import pathlib
import platform
from typing import IO

_NAME = ".lock"


def lock(directory: str | os.PathLike, does: str, error: type[Exception]) -> IO[str]:
    """Locks a directory, which is created if needed, until the returned file is closed.

    Args:
      directory: the directory.
      does: what a holder of the lock does, and the remedy, for the message.
      error: type of the error that names the process that holds the lock.
    """
    path = pathlib.Path(directory, _NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (stays open to hold the lock)
    if not _take(file):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise error(f"{directory} is in use: {holder} {does}")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def is_locked(directory: pathlib.Path) -> bool:
    """Returns whether another process holds the lock of a directory."""
    if not (directory / _NAME).exists():
        return False
    with open(directory / _NAME, "a+", encoding="utf-8") as file:
        return not _take(file)


def _take(file: IO[str]) -> bool:
    """Takes the lock; returns False if another process holds it. Some file systems have no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
