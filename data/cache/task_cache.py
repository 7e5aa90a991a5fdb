"""Token caches of tasks: their paths, when they are built, and when they are refused.

A task is read and tokenised once; afterwards its data are not needed. The path of a cache is
`tokens/<task>/<split>/<fingerprint>` under the cache directory. If a task has only caches with
other fingerprints, one of its inputs has changed; by default this is an error, and no cache is
overwritten. On request, caches with several fingerprints can exist side by side. A cache that SeqIO
made of a task of this project is used while it is of the same records.

The fingerprint covers what `data.cache.description` describes. Random preprocessors of SeqIO's tasks draw
their numbers when the cache is built, from seed 0.
"""

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from espalier.common.ranges import check_choice
from espalier.data import pieces, seqio_tasks
from espalier.data.cache import build, description, existing, fingerprint, in_place, pool
from espalier.data.cache import cache_dir as directories
from espalier.data.cache import store as token_cache
from espalier.data.cache.cache_files import CacheCorruptError
from espalier.data.task import Task

_FORMER_SHARDS = 64  # the most that a cache once had


def caches_path(name: str, split: str, cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Returns the directory that holds the caches of a task's split."""
    parts = ("tokens", quote(name, safe=""), quote(split, safe=""))
    return directories.cache_dir(*parts, override=cache_dir)


def open_task_cache(
    task,
    split: str,
    *,
    cache_dir: str | os.PathLike | None = None,
    changed: token_cache.Changed = "refuse",
    verify: bool = True,
    read: in_place.ReadCache = "auto",
    use_cached: bool = False,
) -> token_cache.Cache:
    """Opens the cache of a task's split; builds it with a progress bar if it is missing.

    Args:
        task: a `data.task.Task`, or a task of SeqIO's.
        split: one of its splits.
        cache_dir: the root of all caches.
        changed: what to do if the existing caches were built from different inputs: 'refuse',
            'build' another cache beside them, or 'replace' them (and a damaged cache).
        verify: check every byte against its checksum; blocks that are read in place always are.
        read: whether a cache in a store is copied to this machine or read in place.
        use_cached: open the one cache that there is, without looking at the task's source; see `existing.open_only`.

    Raises:
        CacheMismatchError: the task has changed since its cache was built.
        CacheCorruptError: the cache is damaged.
        FileNotFoundError: with `use_cached`, there is no cache.
        ValueError: the task has no such split, or the split has no records.
    """
    check_choice("changed", changed, token_cache.Changed)
    check_choice("read_cache", read, in_place.ReadCache)
    if not isinstance(task, Task | seqio_tasks.SeqioTask):
        task = seqio_tasks.SeqioTask(task)
    if use_cached:
        return existing.open_only(
            caches_path(task.name, split, cache_dir), task, read=read, verify=verify
        )
    if split not in task.splits:
        raise ValueError(
            f"Task {task.name!r} has no split {split!r}; it has {', '.join(sorted(task.splits))}."
        )
    files = fingerprint.FileDigests(
        directories.cache_dir("files", "file_digests.json", override=cache_dir)
    )
    features = description.features_of(task)
    described = description.describe(task, split, files, cache_dir)
    num_shards = len(_shards(task, split))
    files.save()
    name = build.fingerprint(described, features, num_shards)
    parent = caches_path(task.name, split, cache_dir)
    directory = parent / name[:16]
    now = {**described, "features": features}
    if not directory.exists():
        directory = _of_seqio(parent, now) or directory
    if not directory.exists() and num_shards > _FORMER_SHARDS:
        former = parent / build.fingerprint(described, features, _FORMER_SHARDS)[:16]
        directory = former if former.exists() else directory
    if changed != "replace" and (opened := in_place.open_if_chosen(directory, read)):
        return _not_empty(opened, task.name, split)
    # An existing cache is read without the lock, so that a read-only cache of another user works.
    if changed == "replace" or not directory.exists():
        with token_cache.building_lock(parent):
            if changed == "replace" and (kept := _remove_others(parent, directory, read)):
                return _not_empty(kept, task.name, split)
            if not directory.exists():  # another process may have built it meanwhile
                with _shared_build(directory, read) as complete:
                    if isinstance(complete, token_cache.Cache):
                        return _not_empty(complete, task.name, split)
                    if not complete:
                        _compare(parent, now, num_shards, changed)
                        _build(task, split, directory, features, described, num_shards)
                        if directory.exists():
                            directories.publish(directory, token_cache.MANIFEST)
                        elif opened := in_place.open_if_chosen(directory, read):
                            return _not_empty(opened, task.name, split)
                        else:  # workers have written it into the store
                            directories.fetch(directory, token_cache.MANIFEST)
    cache = in_place.open_here(directory, verify=verify)
    if not cache.num_records:
        token_cache.remove(directory)
        task.source.num_input_examples(split)  # of files, this is an error that names them
    return _not_empty(cache, task.name, split)


def _not_empty(cache: token_cache.Cache, task: str, split: str) -> token_cache.Cache:
    if not cache.num_records:
        raise ValueError(f"Task {task!r} has no records in split {split!r}.")
    return cache


@contextlib.contextmanager
def _shared_build(
    directory: pathlib.Path, read: in_place.ReadCache = "auto"
) -> Iterator[bool | token_cache.Cache]:
    """Copies the cache if its root is in a store that has it, else holds the store's lock; yields whether it was copied.

    A cache that another host has built while this one waited for the lock, and that is read in place, is yielded itself.

    Raises:
        CacheCorruptError: the cache in the store is damaged.
    """
    marker = token_cache.MANIFEST
    with contextlib.ExitStack() as stack:
        complete: bool | token_cache.Cache = directories.fetch(directory, marker)
        if not complete:
            stack.enter_context(directories.building(directory))
            complete = in_place.open_if_chosen(directory, read) or directories.fetch(
                directory, marker
            )
        if complete is True:
            try:
                token_cache.open_cache(directory)
            except CacheCorruptError as error:
                token_cache.remove(directory)
                raise CacheCorruptError(
                    f"The token cache {directories.address_of(directory)} is damaged: {error} `--replace` deletes the one in the "
                    "store too."
                ) from None
        yield complete


def _remove_others(
    parent: pathlib.Path, directory: pathlib.Path, read: in_place.ReadCache
) -> token_cache.Cache | None:
    """Deletes all caches but an intact one in `directory`; returns that one if only the store has it, and it is read in place."""
    for other, _ in list(existing.manifests(parent)):
        if other == directory:
            with contextlib.suppress(CacheCorruptError):
                token_cache.open_cache(other)
                continue
        token_cache.remove(other)
        if other != directory or not directories.is_published(other, token_cache.MANIFEST):
            directories.remove_in_store(other, token_cache.MANIFEST)
            token_cache.remove_plans(other)
    kept = None
    for address, _ in list(directories.others_in_store(parent, token_cache.MANIFEST)):
        other = parent / address.rpartition("/")[2]
        if other == directory:
            with contextlib.suppress(CacheCorruptError):
                kept = _open_in_store(directory, read)
                continue
        directories.remove_in_store(other, token_cache.MANIFEST)
        token_cache.remove_plans(address)
    return kept


def _open_in_store(directory: pathlib.Path, read: in_place.ReadCache) -> token_cache.Cache | None:
    """Opens the cache that only the store has in place, or copies it; raises CacheCorruptError, and keeps no damaged copy."""
    if opened := in_place.open_if_chosen(directory, read):
        return opened
    directories.fetch(directory, token_cache.MANIFEST)
    try:
        token_cache.open_cache(directory)
    except CacheCorruptError:
        token_cache.remove(directory)
        raise
    return None


def _described(parent: pathlib.Path) -> Iterator[tuple[str, dict, int]]:
    """Yields place, description with features, and number of shards of each intact cache, here and in the store."""
    for place, manifest in existing.everywhere(parent).items():
        if manifest:
            described = {**manifest["description"], "features": manifest["features"]}
            yield place, described, len(manifest["shards"])


def _of_seqio(parent: pathlib.Path, now: dict) -> pathlib.Path | None:
    """Returns the directory of a cache that SeqIO made of what a task of this project is now, if there is one."""
    if "steps" not in now:
        return None
    for place, was, _ in _described(parent):
        if "steps" not in was and not description.changes(was, now):
            return parent / place.rpartition("/")[2]
    return None


def _compare(parent: pathlib.Path, now: dict, num_shards: int, changed: str) -> None:
    """Reports what has changed since the most similar of the other caches."""
    differences = []
    for place, was, shards in _described(parent):
        keys = description.changes(was, now)
        if shards != num_shards:
            keys.append("number of shards")
        if keys == ["probe"]:
            keys = ["output of the preprocessors (the first records differ)"]
        keys = [key for key in keys if key != "probe"]  # a consequence of the others
        differences.append((len(keys), place, keys))
    if not differences:
        return
    _, directory, keys = min(differences)
    if changed == "refuse":
        raise token_cache.CacheMismatchError(
            f"The token cache {directory} was built from different inputs. Changed since then: "
            f"{', '.join(keys)}. If this is intended, build a second cache with `espalier prepare cache` and the "
            "same gin files and bindings (--replace deletes the old one)."
        )
    print(
        f"The token cache {directory} is of other data with this task's name (other {', '.join(keys)}), and stays as it is; "
        "a cache of these data is built beside it.",
        file=sys.stderr,
    )


def _build(task, split, directory, features, description, num_shards) -> None:
    from espalier.common.bars import Bar

    title, shards = f"tokenising {task.name}/{split}", _shards(task, split)
    if not sys.stderr.isatty():  # a line in place of the bar
        print(title, file=sys.stderr, flush=True)
    # Other machines write into the store itself.
    place = (pool.is_elsewhere() and directories.address_of(directory)) or str(directory)
    made = build.Build(place, task, split, features, description, shards)
    made.start()
    with Bar(desc=title, unit="tok", unit_scale=True, file=sys.stderr) as bar:
        pool.run(
            functools.partial(_write_shard, made),
            range(num_shards),
            what=made.name_of,
            bar=bar,
            unit="shards",
            title=title,
            remedy="Finished shards are kept: the same command goes on after them.",
            paths=_paths(task.source, place),
            last=made.finish,
        )


def _write_shard(made: build.Build, shard: int, report: pool.Report) -> pool.Counts:
    made.write_shard(shard, report)
    return pool.Counts(made.counts(shard))


def _paths(source: Any, directory: str) -> tuple[str, ...]:
    """Returns the folders that whoever builds a cache reads and writes."""
    return (*getattr(source, "local_folders", ()), os.path.dirname(directory))


def _shards(task: Task | seqio_tasks.SeqioTask, split: str) -> tuple[tuple[pieces.Piece, ...], ...]:
    """Returns the pieces of each shard of a build; a part of what SeqIO reads is a shard."""
    found = task.pieces(split)
    return pieces.grouped(found) if isinstance(task, Task) else tuple((piece,) for piece in found)
