"""Token caches of SeqIO tasks: their paths, when they are built, and when they are refused.

SeqIO defines a task and tokenises it once; afterwards it is not needed. The path of a cache is
`tokens/<task>/<split>/<fingerprint>` under the cache directory. If a task has only caches with
other fingerprints, one of its inputs has changed; by default this is an error, and no cache is
overwritten. On request, caches with several fingerprints can exist side by side.

The fingerprint of a cache covers the source (the bytes of its files, or the `digest` it declares),
the vocabulary, every preprocessor, TensorFlow's version, an optional `task.version`, and a probe.
The probe is the hash of the first 64 records; it detects changes that no description contains.
Random preprocessors draw their numbers when the cache is built, from seed 0.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from espalier.common.ranges import check_choice
from espalier.data import pieces
from espalier.data.cache import build, fingerprint, pool
from espalier.data.cache import cache_dir as directories
from espalier.data.cache import store as token_cache
from espalier.data.cache.cache_files import CacheCorruptError, canonical

PROBE_RECORDS = 64
DOCUMENT_ID = "document_id"
_BYTES_PER_SHARD = 32_000_000  # of source files, as stored (possibly compressed)
_RECORDS_PER_SHARD = 20_000
_MAX_SHARDS = 64


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
    features = task_features(task)
    description = describe_task(task, split, files)
    num_shards = num_shards_of(task, split)
    files.save()
    name = build.fingerprint(description, features, num_shards)
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
                        directories.publish(directory, token_cache.MANIFEST)
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
        complete = directories.fetch(directory, marker)
        if not complete:
            stack.enter_context(directories.building(directory))
            complete = directories.fetch(directory, marker)
        if complete:
            try:
                token_cache.open_cache(directory)
            except CacheCorruptError as error:
                token_cache.remove(directory)
                raise CacheCorruptError(
                    f"The token cache {directories.address_of(directory)} is damaged: {error} `--replace` deletes the one in the "
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
        directories.remove_in_store(other, token_cache.MANIFEST)
    for address, _ in list(directories.others_in_store(parent, token_cache.MANIFEST)):
        directories.remove_in_store(parent / address.rpartition("/")[2], token_cache.MANIFEST)


def _compare(parent: pathlib.Path, now: dict, num_shards: int, changed: str) -> None:
    """Reports what has changed since the most similar of the other caches."""
    differences = []
    manifests: list[tuple[object, dict]] = list(_manifests(parent))
    for address, raw in directories.others_in_store(parent, token_cache.MANIFEST):
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
    shards = tuple((piece,) for piece in pieces.parts(split, num_shards))
    made = build.Build(str(directory), _SeqioReader(task), split, features, description, shards)
    made.start()
    with Bar(desc=title, unit="tok", unit_scale=True, file=sys.stderr) as bar:
        pool.run(
            made.write_shard,
            range(num_shards),
            what=made.name_of,
            bar=bar,
            remedy="Finished shards are kept: the same command goes on after them.",
        )
    made.finish()


@dataclasses.dataclass(frozen=True)
class _SeqioReader:
    """A SeqIO task as what a build reads."""

    task: Any

    def records(self, split: str, parts: Sequence[pieces.Piece]) -> Iterator[dict]:
        for part in parts:
            yield from read_records(self.task, split, part.begin, part.end or 1)


def task_features(task) -> dict[str, int | str]:
    """Returns {output feature of a task, or `document_id`: vocabulary size, 'text' or 'float32'}.

    Raises:
        ValueError: a feature is not a vector.
    """
    out: dict[str, int | str] = {}
    for name, feature in task.output_features.items():
        if feature.rank != 1:
            raise ValueError(
                f"Task {task.name!r}: feature {name!r} has rank {feature.rank}; only vectors of "
                "tokens are cached."
            )
        floating = np.issubdtype(feature.dtype.as_numpy_dtype, np.floating)
        out[name] = "float32" if floating else int(feature.vocabulary.vocab_size)
    out[DOCUMENT_ID] = "text"
    return out


def describe_task(task, split: str, files: fingerprint.FileDigests) -> dict:
    """Returns everything that determines the records of a task's split, as readable JSON."""
    import tensorflow as tf

    first_records = probe(task, split)  # first: a TFDS set may have no files before it is read
    return {
        "task": task.name,
        "split": split,
        "version": fingerprint.describe(getattr(task, "version", None)),
        "source": _describe_source(task.source, split, files),
        "vocabulary": {
            name: {
                "vocabulary": fingerprint.vocabulary(feature.vocabulary),
                "add_eos": bool(feature.add_eos),
                "dtype": feature.dtype.name,
            }
            for name, feature in task.output_features.items()
            if hasattr(feature, "vocabulary")
        },
        "preprocessors": [fingerprint.describe(step) for step in task.preprocessors],
        "tensorflow": tf.__version__,
        "probe": first_records,
    }


def read_records(task, split: str, shard: int = 0, num_shards: int = 1) -> Iterator[dict]:
    """Returns an iterator over the preprocessed examples of one shard, untrimmed, in source order.

    Raises:
        ValueError: the preprocessors do not yield a required output feature.
    """
    import seqio

    info = None if num_shards == 1 else seqio.ShardInfo(index=shard, num_shards=num_shards)
    dataset = task.source.get_dataset(split=split, shuffle=False, shard_info=info)
    dataset = task.preprocess_precache(dataset, seed=0)
    dataset = task.preprocess_postcache(dataset, sequence_length=None, seed=0)
    required = [name for name, feature in task.output_features.items() if feature.required]
    missing = [name for name in required if name not in dataset.element_spec]
    if missing:
        raise ValueError(
            f"Task {task.name!r}: the preprocessors yield {', '.join(dataset.element_spec)} but "
            f"not the output feature {', '.join(missing)}."
        )
    return dataset.as_numpy_iterator()


def _describe_source(source, split: str, files: fingerprint.FileDigests) -> dict:
    """Describes what the source reads.

    The source or its function may declare a `digest`: a string, or a function of the split. Sources
    that read installed packages do so. Otherwise the description holds the digests of the files.
    """
    function = getattr(source, "_dataset_fn", None)
    inner = getattr(function, "func", function)  # through functools.partial
    out = {
        "class": fingerprint.name_of(type(source)),
        "reader": fingerprint.describe(function or getattr(source, "_reader", None)),
    }
    for holder in (source, function, inner):
        declared = getattr(holder, "digest", None)
        if declared is not None:
            out["digest"] = declared(split) if callable(declared) else declared
            if dropped := getattr(source, "dropped", None):  # by filters; the digest covers them
                out["dropped"] = dropped
            return out
    if (tfds := getattr(source, "tfds_dataset", None)) is not None:
        splits = getattr(tfds, "_split_map", None) or {}
        out["tfds"] = [tfds.resolved_tfds_name(split), fingerprint.describe(splits.get(split))]
    out["files"] = [[os.path.basename(path), files.digest(path)] for path in _files(source, split)]
    return out


def _files(source, split: str) -> list[str]:
    """Returns the local files that a source reads, as far as SeqIO knows them."""
    if hasattr(source, "_dataset_fn"):
        return []
    if (tfds := getattr(source, "tfds_dataset", None)) is not None:
        paths = [instruction.filename for instruction in tfds.files(split)]
    else:
        paths = source.list_shards(split)
    return [str(path) for path in paths if os.path.isfile(path)]


def num_shards_of(task, split: str) -> int:
    """Returns the number of shards of a build.

    Shards are groups of source files. A source with arbitrary sharding gets more shards if it has
    many examples; any other source would have to be read completely for every shard. Starting a
    shard takes a quarter of a second, so thousands of small files do not get a shard each.
    """
    files = _files(task.source, split)
    size = sum(map(os.path.getsize, files))
    shards = max(min(len(files), -(-size // _BYTES_PER_SHARD)), 1)
    if task.source.supports_arbitrary_sharding:
        examples = task.source.num_input_examples(split) or 0
        shards = max(shards, -(-examples // _RECORDS_PER_SHARD))
    return min(shards, _MAX_SHARDS)


def probe(task, split: str) -> str:
    """Returns the hash of the first `PROBE_RECORDS` records that the task yields now."""
    checksum = hashlib.sha256()
    features = task_features(task)
    for record in itertools.islice(read_records(task, split), PROBE_RECORDS):
        for name in features:
            value = record.get(name, b"")
            data = value if isinstance(value, bytes) else np.asarray(value).tobytes()
            checksum.update(f"{name}:{len(data)}:".encode() + data)
    return checksum.hexdigest()
