"""The cache directory, which stores corpora, vocabularies and other derived files between runs."""

import contextlib
import errno
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Sequence

from espalier.common import files
from espalier.data.cache import shared

VARIABLE = "ESPALIER_CACHE"


def cache_dir(*parts: str, override: str | os.PathLike | None = None) -> pathlib.Path:
    """Returns `parts` under `override`, else under $ESPALIER_CACHE, else under ~/.cache/espalier.

    For an address of an object store, these are folders of its local copy, see data/cache/shared.py.
    """
    if override is None:
        override = os.environ.get(VARIABLE) or "~/.cache/espalier"
    return pathlib.Path(shared.local_root(override)).expanduser().joinpath(*parts)


def build_directory(
    target: pathlib.Path, build: Callable[[pathlib.Path], None], *, expected: Sequence[str]
) -> None:
    """Builds a directory that exists complete or not at all, even after a power cut.

    `build` writes into a temporary sibling directory, which is then renamed. If another process
    finished first, its directory is used: both have the same content, because the name is a hash of
    all inputs. An existing directory that lacks one of the `expected` files is replaced.

    In a cache of an object store, a directory that another host has built is copied; otherwise this host builds it for all.
    """
    marker = expected[-1]
    if shared.fetch(target, marker):
        return
    with shared.building(target):
        if not shared.fetch(target, marker):
            _build_here(target, build, expected)
            shared.publish(target, marker)


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


def remember(path: pathlib.Path, content: dict) -> None:
    """Writes JSON that saves time later; does nothing if the cache is not writable."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Synced, because an empty file would count as one that is damaged.
        files.write_json(path, content, synced=True, shared=True)


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
