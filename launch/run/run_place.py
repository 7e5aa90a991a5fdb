"""Where a run's directory is, a local folder or an address of an object store, and the lock of the one process that writes it."""

import contextlib
import os
from typing import IO

from espalier.common import files
from espalier.common.storage import mirror, paths
from espalier.common.storage.lock import HeldError, StoreLock
from espalier.trainers.checkpoints import step_dir


class RunDirectoryError(ValueError):
    """The directory cannot be used, is damaged, or belongs to another run."""


def open_address(address: str, writer: bool) -> tuple[str, StoreLock | None, mirror.Mirror]:
    """Locks a directory in an object store for the writer, and copies its files to a local folder of this process.

    Returns:
      The folder, the lock, and what copies the files of the folder to the store.

    Raises:
      RunDirectoryError: the address is a whole bucket, or another process holds it.
      StoreError: the store refuses, has no such bucket, or cannot be reached.
    """
    address = paths.absolute(address)
    if not paths.split(address)[2]:
        raise RunDirectoryError(
            f"MODEL_DIR = {address!r} is a whole bucket: give the run a folder of its own, {address}/NAME."
        )
    try:
        held = StoreLock(address) if writer else None
    except HeldError as error:
        raise RunDirectoryError(
            f"{address} is in use: {error} is training there. Stop it, or use another MODEL_DIR."
        ) from None
    name = "" if writer else f".{os.getpid()}"
    try:
        copies = mirror.Mirror(
            address, writer=writer, without=(step_dir.CHECKPOINTS, "logs"), name=name
        )
    except BaseException:
        if held is not None:
            held.close()
        raise
    return copies.path, held, copies


def open_folder(path: str, writer: bool) -> tuple[str, IO[str] | None]:
    """Returns the absolute path of a local directory, and its lock, which the writer holds.

    Raises:
      RunDirectoryError: the directory cannot be made or locked, or it is an address of an unknown kind.
    """
    if "://" in path:
        raise RunDirectoryError(
            f"MODEL_DIR = {path!r} is an address of an unknown kind: give a folder, or {' or '.join(paths.SCHEMES)}BUCKET/NAME."
        )
    path = os.path.abspath(os.path.expanduser(path))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # what makes no directory: a name that is too long, links in a circle
        return path, files.lock_folder(path) if writer else None
    except BlockingIOError as error:
        raise RunDirectoryError(
            f"{path} is in use: {error} is training there. Stop it, or use another MODEL_DIR."
        ) from None
    except OSError as error:
        raise RunDirectoryError(
            f"MODEL_DIR = {path!r} cannot be used: {error.strerror}: {error.filename!r}. Give a directory "
            "that can be made and written, or remove what is in its place."
        ) from None
