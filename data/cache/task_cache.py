"""Token caches of SeqIO tasks: their paths, when they are built, and when they are refused.

SeqIO defines a task and tokenises it once; afterwards it is not needed. The path of a cache is
`tokens/<task>/<split>/<fingerprint>` under the cache directory. If a task has only caches with
other fingerprints, one of its inputs has changed; by default this is an error, and no cache is
overwritten. On request, caches with several fingerprints can exist side by side.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator
from urllib.parse import quote

from espalier.data.cache import cache_dir as directories
from espalier.data.cache import fingerprint, shared, task_reader
from espalier.data.cache import store as token_cache
from espalier.data.cache.cache_files import CacheCorruptError, canonical
from espalier.data.choices import check_choice


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
) -> token_cache.Cache:
    """Opens the cache of a SeqIO task's split; builds it with a progress bar if it is missing.

    Args:
        task: a `seqio.Task`.
        split: one of its splits.
        cache_dir: the root of all caches.
        changed: what to do if the existing caches were built from different inputs: 'refuse',
            'build' another cache beside them, or 'replace' them (and a damaged cache).
        verify: check every byte against its checksum.

    Raises:
        CacheMismatchError: the task has changed since its cache was built.
        CacheCorruptError: the cache is damaged.
        ValueError: the task has no such split, or the split has no records.
    """
    check_choice("changed", changed, token_cache.Changed)
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
    # An existing cache is read without the lock, so that a read-only cache of another user works.
    if changed == "replace" or not directory.exists():
        with token_cache.building_lock(parent):
            if changed == "replace":
                _remove_others(parent, directory)
            if not directory.exists():  # another process may have built it meanwhile
                with _shared_build(directory) as complete:
                    if not complete:
                        now = {**description, "features": features}
                        _compare(parent, now, num_shards, changed)
                        _build(task, split, directory, features, description, num_shards)
                        shared.publish(directory, token_cache.MANIFEST)
    cache = token_cache.open_cache(directory, verify=verify)
    if not cache.num_records:
        token_cache.remove(directory)
        raise ValueError(f"Task {task.name!r} has no records in split {split!r}.")
    return cache


@contextlib.contextmanager
def _shared_build(directory: pathlib.Path) -> Iterator[bool]:
    """Copies the cache if its root is in a store that has it, else holds the store's lock; yields whether it was copied.

    Raises:
        CacheCorruptError: the cache in the store is damaged.
    """
    marker = token_cache.MANIFEST
    with contextlib.ExitStack() as stack:
        complete = shared.fetch(directory, marker)
        if not complete:
            stack.enter_context(shared.building(directory))
            complete = shared.fetch(directory, marker)
        if complete:
            try:
                token_cache.open_cache(directory)
            except CacheCorruptError as error:
                token_cache.remove(directory)
                raise CacheCorruptError(
                    f"The token cache {shared.address_of(directory)} is damaged: {error} `--replace` deletes the one in the "
                    "store too."
                ) from None
        yield complete


def _manifests(parent: pathlib.Path) -> Iterator[tuple[pathlib.Path, dict]]:
    """Yields (directory, manifest) of each cache; the manifest is {} if the cache is damaged."""
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
        shared.remove(other, token_cache.MANIFEST)
    for address, _ in list(shared.others(parent, token_cache.MANIFEST)):
        shared.remove(parent / address.rpartition("/")[2], token_cache.MANIFEST)


def _compare(parent: pathlib.Path, now: dict, num_shards: int, changed: str) -> None:
    """Reports what has changed since the most similar of the other caches."""
    differences = []
    manifests: list[tuple[object, dict]] = list(_manifests(parent))
    for address, raw in shared.others(parent, token_cache.MANIFEST):
        with contextlib.suppress(CacheCorruptError):
            manifests.append((address, token_cache.parse_manifest(raw, parent)))
    for directory, manifest in manifests:
        if manifest:
            previous = {**manifest["description"], "features": manifest["features"]}
            keys = [key for key in now if canonical(now[key]) != canonical(previous.get(key))]
            if len(manifest["shards"]) != num_shards:
                keys.append("number of shards")
            if keys == ["probe"]:
                keys = ["output of the preprocessors (the first records differ)"]
            keys = [key for key in keys if key != "probe"]  # a consequence of the others
            differences.append((len(keys), str(directory), keys))
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
        f"A token cache of other data with this task's name is there ({directory}; other {', '.join(keys)}); a second "
        "cache is built beside it.",
        file=sys.stderr,
    )


def _build(task, split, directory, features, description, num_shards) -> None:
    from espalier.common.bars import Bar

    title = f"tokenising {task.name}/{split}"
    if not sys.stderr.isatty():  # a line in place of the bar
        print(title, file=sys.stderr, flush=True)
    with Bar(desc=title, unit="tok", unit_scale=True, file=sys.stderr) as bar:

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
