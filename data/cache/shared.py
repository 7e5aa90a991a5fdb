"""Folders of a cache that is in an object store: one host builds, the others copy.

With an address as the root of the caches (`ESPALIER_CACHE=gs://BUCKET/cache`), a folder is built on this machine as ever, in
the local copy of the root, and then copied to the store, with the file that completes it last. A host that needs a folder
first looks for it in the store, then takes the lock, looks again, and builds. Small files that only save time (digests of
files, counts) stay on each machine. Without an address, every function here does nothing.
"""

import contextlib
import os
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Iterator

from espalier.common.storage import lock, mirror, paths

_CACHES = "caches"  # kind of the local copies
_WAIT_SECONDS = 2.0


def local_root(root: str | os.PathLike) -> str:
    """Returns the folder on this machine of a root of caches: itself, or the local copy of an address."""
    return mirror.place(os.fspath(root), _CACHES) if paths.is_remote(root) else os.fspath(root)


def address_of(directory: pathlib.Path) -> str | None:
    """Returns the address of a folder below the local copy of an address; None for other folders."""
    root = pathlib.Path(mirror.folder(), _CACHES)
    if not directory.is_relative_to(root):
        return None
    scheme, *names = directory.relative_to(root).parts
    return f"{scheme}://{'/'.join(names)}"


def fetch(directory: pathlib.Path, marker: str) -> bool:
    """Copies a folder from the store if it is complete there; returns whether it did.

    Raises:
      StoreError: the store refuses, or cannot be reached.
    """
    address = address_of(directory)
    if address is None or not paths.exists(paths.join(address, marker)):
        return False
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{secrets.token_hex(6)}")
    try:
        mirror.copy_to(address, str(partial))
        with contextlib.suppress(OSError):  # another process of this machine was faster
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory.exists()


def publish(directory: pathlib.Path, marker: str) -> None:
    """Copies a complete folder to the store; raises StoreError."""
    if (address := address_of(directory)) is not None:
        mirror.publish(directory, address, last=(marker,))


def remove(directory: pathlib.Path, marker: str) -> None:
    """Deletes a folder in the store, first the file that completes it; raises StoreError."""
    if (address := address_of(directory)) is not None:
        names = [name for name in paths.entries(address) if name != marker]
        paths.delete(*(paths.join(address, name) for name in (marker, *names)))


def others(parent: pathlib.Path, marker: str) -> Iterator[tuple[str, bytes]]:
    """Yields address and marker of the complete folders that only the store has below a folder."""
    address = address_of(parent)
    if address is None:
        return
    for name in paths.names(address):
        if not (parent / name).exists():
            with contextlib.suppress(FileNotFoundError):
                yield paths.join(address, name), paths.read(paths.join(address, name, marker))


@contextlib.contextmanager
def building(directory: pathlib.Path) -> Iterator[None]:
    """Holds the store's lock of a folder; waits for a host that builds it now."""
    address = address_of(directory)
    if address is None:
        yield
        return
    waiting = False
    while True:
        try:
            held = lock.StoreLock(f"{address}.building")
            break
        except lock.HeldError as error:
            if not waiting:
                print(f"waiting for {error}, which builds {address}", file=sys.stderr, flush=True)
            waiting = True
            time.sleep(_WAIT_SECONDS)
    try:
        yield
    finally:
        held.close()
