"""The cache directory, which stores corpora, vocabularies and other derived files between runs, and is perhaps shared by hosts.

With an address of an object store as the root of the caches (`ESPALIER_CACHE=gs://BUCKET/cache`), one host builds a folder and the
others copy it. It is built on this machine as ever, in the local copy of the root, and then copied to the store, with the file
that completes it last. A host that needs a folder first looks for it in the store, then takes the lock, looks again, and builds.
Small files that only save time are shared where reading what they stand for is slow: counts, and digests of objects in a store. Without an address, `fetch`, `publish`, `remove_in_store`,
`others_in_store` and `building` do nothing.
"""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from espalier.common import files
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


def is_published(directory: pathlib.Path, marker: str) -> bool:
    """Returns whether a folder is complete in the store; raises StoreError."""
    address = address_of(directory)
    return address is not None and paths.exists(paths.join(address, marker))


def fetch(directory: pathlib.Path, marker: str) -> bool:
    """Copies a folder from the store if it is complete there; returns whether it did.

    Raises:
      StoreError: the store refuses, or cannot be reached.
    """
    if not is_published(directory, marker):
        return False
    address = address_of(directory)
    assert address is not None
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


def remove_in_store(directory: pathlib.Path, marker: str) -> None:
    """Deletes a folder in the store, first the file that completes it; raises StoreError."""
    if (address := address_of(directory)) is not None:
        names = [name for name in paths.entries(address) if name != marker]
        paths.delete(*(paths.join(address, name) for name in (marker, *names)))


def others_in_store(parent: pathlib.Path, marker: str) -> Iterator[tuple[str, bytes]]:
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


VARIABLE = "ESPALIER_CACHE"


def cache_dir(*parts: str, override: str | os.PathLike | None = None) -> pathlib.Path:
    """Returns `parts` under `override`, else under $ESPALIER_CACHE, else under ~/.cache/espalier.

    For an address of an object store, these are folders of its local copy.
    """
    if override is None:
        override = os.environ.get(VARIABLE) or "~/.cache/espalier"
    return pathlib.Path(local_root(override)).expanduser().joinpath(*parts)


def build_directory(
    target: pathlib.Path,
    build: Callable[[pathlib.Path], None],
    *,
    expected: Sequence[str],
    in_place: bool = False,
) -> None:
    """Builds a directory that exists complete or not at all, even after a power cut.

    `build` writes into a temporary sibling directory, which is then renamed. If another process
    finished first, its directory is used: both have the same content, because the name is a hash of
    all inputs. An existing directory that lacks one of the `expected` files is replaced.

    In a cache of an object store, a directory that another host has built is copied; otherwise this host builds it for all.
    With `in_place` it is in the store only, where it is read.
    """
    marker = expected[-1]
    find = is_published if in_place else fetch
    if find(target, marker):
        return
    with building(target):
        if not find(target, marker):
            _build_here(target, build, expected)
            publish(target, marker)
            if in_place:
                shutil.rmtree(target)


def _build_here(
    target: pathlib.Path, build: Callable[[pathlib.Path], None], expected: Sequence[str]
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = _temporary(target), _temporary(target)
    temporary.mkdir(mode=0o755)
    try:
        build(temporary)
        for path in (*temporary.rglob("*"), temporary):
            files.sync(path)
        while not _moved(temporary, target):
            if all((target / name).is_file() for name in expected):
                break
            with contextlib.suppress(FileNotFoundError):  # another process replaces it too
                target.rename(replaced)
        files.sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def remember(path: pathlib.Path, content: dict, *, shared: bool = False) -> None:
    """Writes JSON that saves time later; does nothing if the cache is not writable.

    Args:
      path: the file of this machine.
      content: the JSON.
      shared: write it into the store too, if the root of the caches is there.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Synced, because an empty file would count as one that is damaged.
        files.write_json(path, content, synced=True, shared=True)
        if shared and (address := address_of(path)) is not None:
            mirror.put(str(path), address)


def recall(path: pathlib.Path, *, fresh: bool = False) -> dict | None:
    """Returns JSON that was remembered, here or, if it was shared, by another host; None if there is none.

    Args:
      path: the file of this machine.
      fresh: whether the store's counts, where there is one: it may have changed.

    Raises:
      StoreError: the store refuses, or cannot be reached.
    """
    address = address_of(path)
    content = None
    with contextlib.suppress(FileNotFoundError):
        if address is None or not fresh:
            content = _parsed(path.read_bytes())
    if content is None and address is not None:
        with contextlib.suppress(FileNotFoundError):
            content = _parsed(paths.read(address))
            if content is not None:
                remember(path, content)
    return content


def _parsed(data: bytes) -> dict | None:
    try:
        content = json.loads(data)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _moved(directory: pathlib.Path, target: pathlib.Path) -> bool:
    """Renames the directory to `target`; returns False if `target` exists and is not empty."""
    try:
        directory.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


def _temporary(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")
