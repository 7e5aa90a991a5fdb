"""Token caches of SeqIO tasks: where they lie, when they are built, and when they are refused.

SeqIO defines a task and tokenises it, once; after that it is not needed. A cache lies in
`tokens/<task>/<split>/<fingerprint>` under the cache directory. Where a task has only caches of
other fingerprints, something it is made of has changed, and that is said rather than built over;
caches of several fingerprints may lie side by side once they have been asked for.
"""

import os
import pathlib
import sys
from collections.abc import Iterator
from typing import get_args
from urllib.parse import quote

from data.cache import cache_dir as directories
from data.cache import fingerprint, task_reader
from data.cache import store as token_cache
from data.cache.cache_files import CacheCorruptError, canonical

CHANGED = get_args(token_cache.Changed)


def caches_path(name: str, split: str, cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Where the caches of a task's split lie."""
    parts = ("tokens", quote(name, safe=""), quote(split, safe=""))
    return directories.cache_dir(*parts, override=cache_dir)


def open_task_cache(
    task,
    split: str,
    *,
    cache_dir: str | os.PathLike | None = None,
    changed: token_cache.Changed = "refuse",
    verify: bool = True,
) -> token_cache.Cache:
    """Opens the cache of a SeqIO task's split, building it with a progress bar where it is missing.

    Args:
        task: a `seqio.Task`.
        split: one of its splits.
        cache_dir: the root of all caches; see `data.cache.cache_dir`.
        changed: what to do where the caches there are were built from something else: 'refuse',
            'build' another one beside them, or 'replace' them (and a damaged one).
        verify: check every byte against its checksum.

    Raises:
        CacheMismatchError: the task has changed since its cache was built.
        CacheCorruptError: the cache is damaged.
        ValueError: the task has no such split, or no records in it.
    """
    if changed not in CHANGED:
        raise ValueError(f"changed={changed!r} is none of {', '.join(map(repr, CHANGED))}.")
    if split not in task.splits:
        raise ValueError(
            f"Task {task.name!r} has no split {split!r}; it has {', '.join(sorted(task.splits))}."
        )
    files = fingerprint.FileDigests(
        directories.cache_dir("files", "file_digests.json", override=cache_dir)
    )
    features = task_reader.task_features(task)
    description = task_reader.describe_task(task, split, files)
    num_shards = task_reader.num_shards(task, split)
    files.save()
    name = token_cache.fingerprint(description, features, num_shards)
    parent = caches_path(task.name, split, cache_dir)
    directory = parent / name[:16]
    # What is there is only read, without the lock, so that a cache that others keep can be used.
    if changed == "replace" or not directory.exists():
        with token_cache.building_lock(parent):
            if changed == "replace":
                _remove_others(parent, directory)
            if not directory.exists():  # another process may have built it meanwhile
                _compare(parent, {**description, "features": features}, num_shards, changed)
                _build(task, split, directory, features, description, num_shards)
    cache = token_cache.open_cache(directory, verify=verify)
    if not cache.num_records:
        token_cache.remove(directory)
        raise ValueError(f"Task {task.name!r} has no records in split {split!r}.")
    return cache


def _manifests(parent: pathlib.Path) -> Iterator[tuple[pathlib.Path, dict]]:
    """The caches that lie there, intact or not; what is damaged has an empty manifest."""
    for directory in sorted(parent.iterdir()) if parent.exists() else ():
        if directory.is_dir() and not directory.suffix:
            try:
                yield directory, token_cache.read_manifest(directory)
            except CacheCorruptError:
                yield directory, {}


def _remove_others(parent: pathlib.Path, directory: pathlib.Path) -> None:
    for other, _ in list(_manifests(parent)):
        if other == directory:
            try:
                token_cache.open_cache(other)
                continue
            except CacheCorruptError:
                pass
        token_cache.remove(other)


def _compare(parent: pathlib.Path, now: dict, num_shards: int, changed: str) -> None:
    """Says what has changed since the nearest of the other caches; with 'refuse', as an error."""
    found = []
    for directory, manifest in _manifests(parent):
        if manifest:
            was = {**manifest["description"], "features": manifest["features"]}
            keys = [key for key in now if canonical(now[key]) != canonical(was.get(key))]
            if len(manifest["shards"]) != num_shards:
                keys.append("number of shards")
            if keys == ["probe"]:
                keys = ["output of the preprocessors (the first records differ)"]
            keys = [key for key in keys if key != "probe"]  # a consequence of the others
            found.append((len(keys), str(directory), keys))
    if not found:
        return
    _, directory, keys = min(found)
    what = (
        f"The token cache {directory} was built from something else; changed since: "
        f"{', '.join(keys)}."
    )
    if changed == "refuse":
        raise token_cache.CacheMismatchError(
            f"{what} If that is meant, build the new cache beside it with `python -m launch.prepare cache` and "
            "the same gin files and bindings (--replace deletes the old one)."
        )
    print(f"{what} Another one is built beside it.", file=sys.stderr)


def _build(task, split, directory, features, description, num_shards) -> None:
    import tqdm

    interactive = sys.stderr.isatty()
    with tqdm.tqdm(
        desc=f"tokenising {task.name}/{split}",
        unit="tok",
        unit_scale=True,
        mininterval=0.5 if interactive else 30,
        file=sys.stderr,
    ) as bar:

        def on_record(shard: int, values: int) -> None:
            if bar.update(values) and num_shards > 1:
                bar.set_postfix_str(f"shard {shard + 1}/{num_shards}", refresh=False)

        token_cache.build(
            directory,
            lambda shard: task_reader.read_records(task, split, shard, num_shards),
            features=features,
            description=description,
            num_shards=num_shards,
            on_record=on_record,
        )
