"""The token caches that there are of a task's split, on this machine and in the store."""

import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from espalier.common.bars import Bar
from espalier.common.storage import paths
from espalier.data.cache import cache_dir as directories
from espalier.data.cache import description, in_place
from espalier.data.cache import store as token_cache
from espalier.data.cache.cache_files import CacheCorruptError, canonical


def manifests(parent: pathlib.Path) -> Iterator[tuple[pathlib.Path, dict]]:
    """Yields (directory, manifest) of each cache of this machine; the manifest is {} if the cache is damaged."""
    for directory in sorted(parent.iterdir()) if parent.exists() else ():
        if directory.is_dir() and not directory.suffix:
            try:
                yield directory, token_cache.read_manifest(directory)
            except CacheCorruptError:
                yield directory, {}


def everywhere(parent: pathlib.Path) -> dict[str, dict]:
    """Returns {folder or address: manifest} of the caches here and of those that only the store has; {} if one is damaged."""
    found = {str(directory): manifest for directory, manifest in manifests(parent)}
    for address, raw in directories.others_in_store(parent, token_cache.MANIFEST):
        try:
            found[address] = token_cache.parse_manifest(raw, address)
        except CacheCorruptError:
            found[address] = {}
    return found


def open_only(
    parent: pathlib.Path,
    task: Any,
    *,
    read: in_place.ReadCache,
    verify: bool,
) -> token_cache.Cache:
    """Opens the only cache of a task's split, whatever its source is now.

    Args:
      parent: the folder of the caches of the split.
      task: the task, whose features and vocabularies the cache must have.
      read, verify: see `task_cache.open_task_cache`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: there are several, or it has other features or is of other vocabularies.
      CacheCorruptError: it is damaged.
    """
    found, features = everywhere(parent), description.features_of(task)
    where = directories.address_of(parent) or parent
    if not found:
        raise FileNotFoundError(
            f"USE_CACHED = True, and there is no token cache below {where}. Build it with `espalier prepare cache`, set "
            "ESPALIER_CACHE to where it is, or set USE_CACHED = False."
        )
    if len(found) > 1:
        raise ValueError(
            f"USE_CACHED = True, and there are {len(found)} token caches below {where}:\n{_listed(found)}\nDelete those that "
            "are not meant, or set USE_CACHED = False to take the one of the sources as they are now."
        )
    ((place, manifest),) = found.items()
    directory = parent / pathlib.PurePosixPath(place).name
    if manifest and canonical(manifest["features"]) != canonical(features):
        raise ValueError(
            f"USE_CACHED = True, and the token cache {place} has the features {manifest['features']}, but the task "
            f"{dict(features)} (sizes of vocabularies). Build it anew with `espalier prepare cache`, or set USE_CACHED = False."
        )
    was = manifest.get("description", {})
    now = {"vocabulary": description.vocabularies_of(task), "steps": task.made_by().get("steps")}
    # Caches that SeqIO made have no steps, but preprocessors.
    if other := [key for key in now if key in was and canonical(was[key]) != canonical(now[key])]:
        raise ValueError(
            f"USE_CACHED = True, and the token cache {place} has other {' and '.join(other)} than the task (tokens, BOS or EOS): its ids "
            "would mean other texts. Give the task what the cache was built with, build it anew with `espalier prepare cache`, or set "
            "USE_CACHED = False."
        )
    if opened := in_place.open_if_chosen(directory, read):
        return opened
    if paths.is_remote(place):
        with token_cache.building_lock(parent):
            if not directory.exists():
                directories.fetch(directory, token_cache.MANIFEST)
    return in_place.open_here(directory, verify=verify)


def add_checksums(parent: pathlib.Path) -> None:
    """Adds checksums of blocks to the caches of a task's split, here and in the store; prints which, with a progress bar.

    Raises:
      CacheCorruptError: a cache is damaged.
      OSError: a file cannot be read or written.
    """
    folders = [str(path.parent) for path in parent.glob(f"*/{token_cache.MANIFEST}")]
    if address := directories.address_of(parent):
        folders += [f"{address}/{name}" for name in paths.names(address)]
    for place in folders:
        try:
            with Bar(
                desc=f"checksums of {place}", unit="B", unit_scale=True, file=sys.stderr
            ) as bar:
                made = in_place.add_checksums(place, bar.update)
        except FileNotFoundError:  # a lock, or a cache that is being built
            continue
        print(f"{place}: {'added checksums of blocks' if made else 'has checksums of blocks'}")


def _listed(found: Mapping[str, dict]) -> str:
    """Returns a line for each cache: its size, and by what it differs from the first."""
    first: dict = {}
    lines = []
    for place, manifest in found.items():
        if not manifest:
            lines.append(f"  {place}: damaged")
            continue
        facts = {
            **manifest["description"],
            "features": manifest["features"],
            "number of shards": len(manifest["shards"]),
        }
        text = f"{manifest['records']:,} records"
        if first:
            every = description.changes(first, facts)
            keys = [key for key in every if key != "probe"] or every  # a consequence of the others
            text += f"; other {', '.join(keys)} than the first" if keys else "; as the first"
        first = first or facts
        lines.append(f"  {place}: {text}")
    return "\n".join(lines)
