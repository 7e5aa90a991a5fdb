"""Folders that a conversion makes: whole under their final name, or not there."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from espalier.common import files
from espalier.common.storage import mirror, paths

# What is copied last to an object store: a reader takes a checkpoint for complete once these are there.
# A stage of several merges is used again once its merge.json is there.
_LAST = ("config.json", "manifest.json", "merge.json")


class ConvertError(ValueError):
    """A conversion that is not possible with these arguments."""


def check_space(folder: str, needed: int) -> None:
    """Raises ConvertError if the disk has too little free space."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConvertError(
            f"{os.path.dirname(folder)} has {free / 1e9:.1f} GB free, but the weights need "
            f"{needed / 1e9:.1f} GB: free some space, or write to another disk."
        )


@contextlib.contextmanager
def new_directory(target: str, *, goes_on: Callable[[str], bool] | None = None) -> Iterator[str]:
    """Yields a temporary directory, which is renamed to `target` (or copied to an address) at the end, or removed after an error.

    A killed process leaves `.<target>.partial`, which is ignored, and removed by the next conversion to the same target.

    Args:
      target: the final path.
      goes_on: returns whether the next conversion can continue with a directory that a killed process left. With it, an
        interrupt leaves the directory too. None for conversions that begin again.

    Raises:
      ConvertError: the target exists, or another process is writing it.
    """
    if paths.is_remote(target):
        with mirror.new_folder(target, last=_LAST) as folder:
            yield folder
        return
    target = os.path.abspath(target)
    parent, name = os.path.split(target)
    if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        raise ConvertError(f"{target} exists: give another directory, or remove it first.")
    partial = os.path.join(parent, f".{name}.partial")
    with _parents(parent), _locked(f"{partial}.lock", target):
        if goes_on is None or not (os.path.isdir(partial) and goes_on(partial)):
            shutil.rmtree(partial, ignore_errors=True)
            os.mkdir(partial)
        try:
            yield partial
            os.rename(partial, target)
        except BaseException as error:
            if goes_on is None or isinstance(error, Exception):
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _parents(folder: str) -> Iterator[None]:
    """Creates a directory and its parents; after an error, removes those that it created and that are empty."""
    above = [folder, *map(str, pathlib.Path(folder).parents)]
    missing = [path for path in above if not os.path.isdir(path)]
    os.makedirs(folder, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # Another process has put files there.
            for path in missing:
                os.rmdir(path)
        raise


@contextlib.contextmanager
def _locked(path: str, target: str) -> Iterator[None]:
    with open(path, "a", encoding="utf-8") as lock:
        try:
            files.lock(lock)
        except BlockingIOError:
            raise ConvertError(f"Another process is writing {target}: wait for it.") from None
        try:
            yield
        finally:
            os.unlink(path)
