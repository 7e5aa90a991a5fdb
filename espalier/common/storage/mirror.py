"""Copies of objects in local folders, for what needs files: memory maps, tokenizers, logs that grow, other libraries.

A copy lies under $ESPALIER_COPIES, or else `stores` in the folder of the caches, at its scheme, bucket and key. An index
beside it records the version of each object that was copied, so that only changed ones are read again.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence

from espalier.common import files
from espalier.common.storage import paths

COPIES = "ESPALIER_COPIES"
_CACHE = "ESPALIER_CACHE"  # data/cache/cache_dir.py; an address there is not a folder
_THREADS = 8
_TRIES = 5  # of copying one object
_LEFT_SECONDS = 86_400.0  # after which a half copy that does not grow is of a killed process


def folder() -> str:
    """Returns the local folder of all copies."""
    if copies := os.environ.get(COPIES):
        return os.path.abspath(os.path.expanduser(copies))
    cache = os.environ.get(_CACHE) or ""
    if not cache or paths.is_remote(cache):
        cache = "~/.cache/espalier"
    return os.path.join(os.path.abspath(os.path.expanduser(cache)), "stores")


def place(address: str, kind: str = "copies") -> str:
    """Returns the local path of an address; `kind` separates the copies of readers from the files of a writer."""
    scheme, bucket, key = paths.split(address)
    return os.path.join(folder(), kind, scheme, bucket, *filter(None, key.split("/")))


def local(
    path: str | os.PathLike, *, without: Sequence[str] = (), suffixes: tuple[str, ...] = ("",)
) -> str:
    """Returns a path of this machine with the content of `path`: itself, or for an address a copy that is up to date.

    Args:
      path: a file or folder.
      without: folders below an address that are not copied, such as 'checkpoints'.
      suffixes: ends of the names of the files that are copied.

    Raises:
      FileNotFoundError: there is no such object.
      StoreError: the store refuses, or cannot be reached.
    """
    if not paths.is_remote(path):
        return os.fspath(path)
    address = paths.absolute(path)
    target = place(address)
    if paths.split(address)[2] and paths.exists(address):
        parent, name = address.rpartition("/")[::2]
        _pull(parent, os.path.dirname(target), {name: paths.entry(address)})
        return target
    stored = paths.entries(address)
    wanted = _wanted(stored, without)
    objects = {name: entry for name, entry in wanted.items() if name.endswith(suffixes)}
    if not objects:
        raise FileNotFoundError(f"{address}: there is no such object or folder.")
    _pull(address, target, objects, kept=stored)  # what others have asked for stays
    return target


def copy_to(address: str, target: str) -> None:
    """Copies all objects below an address into a new local folder; raises StoreError."""
    _pull(paths.absolute(address), target, _wanted(paths.entries(address), ()))
    os.unlink(_index_path(target))


def _wanted(objects: dict[str, paths.Entry], without: Sequence[str]) -> dict[str, paths.Entry]:
    return {
        name: entry
        for name, entry in objects.items()
        if name.partition("/")[0] not in without and not os.path.basename(name).startswith(".lock.")
    }


def _index_path(target: str) -> str:
    return f"{target}.index"


def _read_index(target: str) -> dict[str, list]:
    try:
        index = json.loads(pathlib.Path(_index_path(target)).read_bytes())
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _state(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def _pull(
    address: str,
    target: str,
    objects: dict[str, paths.Entry],
    *,
    kept: Collection[str] | None = None,
) -> dict[str, list]:
    """Copies changed objects into a folder; returns {name: [version, size, time]} of these.

    Args:
      address: where the objects are.
      target: the folder.
      objects: those that are copied, by their names.
      kept: the names of the files that stay in the folder, with half copies that other processes may be writing; by default
        all files stay.
    """
    index = _read_index(target)

    def copy(item: tuple[str, paths.Entry]) -> tuple[str, list]:
        name, entry = item
        path = os.path.join(target, *name.split("/"))
        with contextlib.suppress(OSError):
            if index.get(name) == [entry.version, *_state(path)] and entry.version:
                return name, index[name]
        _get(paths.join(address, name), path, entry.size)
        return name, [entry.version, *_state(path)]

    os.makedirs(target, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        copied = dict(pool.map(copy, objects.items()))
    if kept is not None:
        for path in list(_files(target)):
            with contextlib.suppress(FileNotFoundError):  # another process deletes the same files
                if os.path.relpath(path, target) not in kept and not _is_growing(path):
                    os.unlink(path)
        index = {name: state for name, state in index.items() if name in kept}
    text = json.dumps({**index, **copied})
    # Without an index everything is copied again.
    files.write(_index_path(target), text, synced=False, shared=True)
    return copied


def _is_growing(path: str) -> bool:
    """Returns whether a file is a half copy that a process may be writing."""
    return path.endswith(".partial") and time.time() - os.stat(path).st_mtime < _LEFT_SECONDS


def _get(address: str, path: str, size: int) -> None:
    """Copies an object of the listed size to a file, which is there whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # A copy that a power cut emptied has another size than the index says, and is made again.
    with files.replacing(path, synced=False, shared=True) as file:
        for _ in range(_TRIES):
            with paths.reporting(address):
                paths.filesystem(address).get_file(address, file.name)
            if (read := os.path.getsize(file.name)) == size:
                return
            size = paths.entry(address).size  # another process may have replaced it since
        raise paths.StoreError(
            f"{address}: {read} of {size} bytes were read. Start again once the store answers."
        )


def _files(target: str) -> Iterator[str]:
    for parent, _, names in os.walk(target):
        yield from (os.path.join(parent, name) for name in names)


def put(path: str, address: str) -> None:
    """Copies a local file to an address."""
    with paths.reporting(address):
        paths.filesystem(address).put_file(path, address)


def publish(source: str | os.PathLike, address: str, *, last: Sequence[str] = ()) -> None:
    """Copies a local folder to an address; files named in `last`, which complete it, are copied last, in this order."""
    files = {os.path.relpath(path, source): path for path in _files(os.fspath(source))}
    order = {name: number for number, name in enumerate(last)}
    ends = sorted(
        (n for n in files if os.path.basename(n) in order), key=lambda n: order[os.path.basename(n)]
    )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        rest = [name for name in sorted(files) if name not in ends]
        list(pool.map(lambda name: put(files[name], paths.join(address, name)), rest))
    for name in ends:
        put(files[name], paths.join(address, name))


@contextlib.contextmanager
def new_folder(address: str, *, last: Sequence[str]) -> Iterator[str]:
    """Yields a temporary local folder, which is copied to an address that has no objects yet; see `publish`.

    Raises:
      FileExistsError: there are objects below the address.
    """
    address = paths.absolute(address)
    if paths.names(address):
        raise FileExistsError(f"{address} exists: give another address, or remove it first.")
    os.makedirs(folder(), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder(), prefix="new_") as parent:
        target = os.path.join(parent, address.rpartition("/")[2])
        os.mkdir(target)
        yield target
        publish(target, address, last=last)


class Mirror:
    """The local folder of a process that writes files below an address, and copies them there.

    Files and their order are those of the folder: a changed file is copied whole, and a deleted one is deleted.
    """

    def __init__(
        self,
        address: str,
        *,
        writer: bool,
        without: Sequence[str],
        name: str = "",
        beginning: str = "",
    ):
        """Makes the folder, with the files that are below the address now, and no others.

        Half copies that a killed process left within the last day stay; they are never pushed.

        Args:
          address: where the files are.
          writer: whether this process writes.
          without: folders below the address that are not copied.
          name: tells apart processes of one machine.
          beginning: how the names of the files begin.
        """
        self.address = paths.absolute(address)
        self.path = place(paths.join(self.address, beginning), f"runs{name}")
        self._without = tuple(without)
        self._lock = threading.Lock()
        if not writer:
            shutil.rmtree(self.path, ignore_errors=True)
        wanted = _wanted(paths.entries(self.address, beginning), without)
        pulled = _pull(self.address, self.path, wanted, kept=wanted)
        self._copied = {name: state[1:] for name, state in pulled.items()}

    def push_file(self, name: str) -> None:
        """Copies one file; raises StoreError."""
        with self._lock:
            path = os.path.join(self.path, name)
            state = _state(path)
            put(path, paths.join(self.address, name))
            self._copied[name] = state

    def push(self) -> None:
        """Copies new and changed files, in the order in which they were written; raises StoreError."""
        with self._lock:
            states = {}
            for path in _files(self.path):
                name = os.path.relpath(path, self.path)
                if name.partition("/")[0] in self._without or _is_temporary(name):
                    continue
                with contextlib.suppress(FileNotFoundError):  # replaced at this moment
                    states[name] = _state(path)
            changed = [name for name in states if states[name] != self._copied.get(name)]
            for name in sorted(changed, key=lambda name: states[name][1]):
                with contextlib.suppress(FileNotFoundError):
                    put(os.path.join(self.path, name), paths.join(self.address, name))
                    self._copied[name] = states[name]
            for name in sorted(set(self._copied) - set(states)):
                paths.delete(paths.join(self.address, name))
                del self._copied[name]


def _is_temporary(name: str) -> bool:
    base = os.path.basename(name)
    return base.startswith(".") or base.endswith((".tmp", ".partial"))
