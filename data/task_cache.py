"""Token caches of SeqIO tasks: what is in their fingerprint, how they are built, where they lie.

SeqIO defines a task and tokenises it, once; after that it is not needed. The fingerprint of a cache
covers the source (the bytes of its files, or the `digest` its reader declares), the vocabulary,
every preprocessor, TensorFlow's version, an optional `task.version`, and a probe: the hash of the
first 64 records, which sees what no description does. Preprocessors that draw random numbers draw
them when the cache is built, from seed 0.
"""

import hashlib
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator
from urllib.parse import quote

import numpy as np

from data import cache as token_cache
from data import cache_dir as directories
from data import fingerprint
from data.cache_files import CacheCorruptError

PROBE_RECORDS = 64
DOCUMENT_ID = "document_id"
_RECORDS_PER_SHARD = 20_000
_MAX_SHARDS = 64


def cache_path(name: str, split: str, cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Where the cache of a task's split lies."""
    parts = ("tokens", quote(name, safe=""), quote(split, safe=""))
    return directories.cache_dir(*parts, override=cache_dir)


def open_task_cache(
    task,
    split: str,
    *,
    cache_dir: str | os.PathLike | None = None,
    rebuild: bool = False,
    verify: bool = True,
) -> token_cache.Cache:
    """Opens the cache of a SeqIO task's split, building it with a progress bar where it is missing.

    Args:
        task: a `seqio.Task`.
        split: one of its splits.
        cache_dir: the root of all caches; see `data.cache_dir`.
        rebuild: replace a cache that was built from something else.
        verify: check every byte against its checksum.

    Raises:
        CacheMismatchError: the cache was built from another source, vocabulary or preprocessor.
        CacheCorruptError: the cache is damaged.
        ValueError: the task has no such split, or no records in it.
    """
    if split not in task.splits:
        raise ValueError(
            f"Task {task.name!r} has no split {split!r}; it has {', '.join(sorted(task.splits))}."
        )
    directory = cache_path(task.name, split, cache_dir)
    features = task_features(task)
    files = fingerprint.FileDigests(
        directories.cache_dir("files", "file_digests.json", override=cache_dir)
    )
    description = describe_task(task, split, files)
    files.save()
    num_shards = _num_shards(task, split)
    with token_cache.building_lock(directory):
        if directory.exists() and rebuild and not _same(directory, description, features):
            token_cache.remove(directory)
        if directory.exists():
            _refuse_mismatch(directory, description, features, num_shards)
        else:
            _build(task, split, directory, features, description, num_shards)
    cache = token_cache.open_cache(directory, verify=verify)
    if not cache.num_records:
        token_cache.remove(directory)
        raise ValueError(f"Task {task.name!r} has no records in split {split!r}.")
    return cache


def task_features(task) -> dict[str, int | str]:
    """The features stored for a task: its output features, and `document_id` where it has one."""
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
    """Everything that decides the records of a task's split, as readable JSON."""
    import tensorflow as tf

    probe = _probe(task, split)  # first: a TFDS set may have no files before it is read
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
        "probe": probe,
    }


def read_records(task, split: str, shard: int = 0, num_shards: int = 1) -> Iterator[dict]:
    """The preprocessed examples of one shard, untrimmed, in the source's order."""
    import seqio

    source = task.source
    if num_shards == 1:
        dataset = source.get_dataset(split=split, shuffle=False)
    elif source.supports_arbitrary_sharding or len(source.list_shards(split)) >= num_shards:
        info = seqio.ShardInfo(index=shard, num_shards=num_shards)
        dataset = source.get_dataset(split=split, shuffle=False, shard_info=info)
    else:
        dataset = source.get_dataset(split=split, shuffle=False).shard(num_shards, shard)
    dataset = task.preprocess_precache(dataset, seed=0)
    dataset = task.preprocess_postcache(dataset, sequence_length=None, seed=0)
    missing = [
        name
        for name, feature in task.output_features.items()
        if feature.required and name not in dataset.element_spec
    ]
    if missing:
        raise ValueError(
            f"Task {task.name!r}: the preprocessors yield {', '.join(dataset.element_spec)} but "
            f"not the output feature {', '.join(missing)}."
        )
    return dataset.as_numpy_iterator()


def _describe_source(source, split: str, files: fingerprint.FileDigests) -> dict:
    """What the source reads. A reader may declare it: `digest` on the source or on its function,
    a string or a function of the split (sources that read installed packages do)."""
    function = getattr(source, "_dataset_fn", None)
    inner = getattr(function, "func", function)  # through functools.partial
    out = {
        "class": f"{type(source).__module__}.{type(source).__qualname__}",
        "reader": fingerprint.describe(function or getattr(source, "_reader", None)),
    }
    for holder in (source, function, inner):
        declared = getattr(holder, "digest", None)
        if declared is not None:
            out["digest"] = declared(split) if callable(declared) else declared
            return out
    if (tfds := getattr(source, "tfds_dataset", None)) is not None:
        out["tfds"] = tfds.resolved_tfds_name(split)
    out["files"] = [[os.path.basename(path), files.digest(path)] for path in _files(source, split)]
    return out


def _files(source, split: str) -> list[str]:
    """The local files a source reads, as far as SeqIO knows them."""
    if hasattr(source, "_dataset_fn"):
        return []
    if (tfds := getattr(source, "tfds_dataset", None)) is not None:
        paths = [instruction.filename for instruction in tfds.files(split)]
    else:
        paths = source.list_shards(split)
    return [str(path) for path in paths if os.path.isfile(path)]


def _num_shards(task, split: str) -> int:
    """Shards of a build: one per source file, more where the examples are known to be many."""
    examples = task.source.num_input_examples(split) or 0
    shards = max(len(_files(task.source, split)), -(-examples // _RECORDS_PER_SHARD))
    return min(max(shards, 1), _MAX_SHARDS)


def _probe(task, split: str) -> str:
    """The hash of the first records as they come out now."""
    checksum = hashlib.sha256()
    features = task_features(task)
    for record in itertools.islice(read_records(task, split), PROBE_RECORDS):
        for name in features:
            value = record.get(name, b"")
            data = value if isinstance(value, bytes) else np.asarray(value).tobytes()
            checksum.update(f"{name}:{len(data)}:".encode() + data)
    return checksum.hexdigest()


def _same(directory: pathlib.Path, description: dict, features: dict) -> bool:
    try:
        manifest = token_cache.read_manifest(directory)
        shards = len(manifest["shards"])
        return manifest["fingerprint"] == token_cache.fingerprint(description, features, shards)
    except CacheCorruptError:
        return False


def _refuse_mismatch(
    directory: pathlib.Path, description: dict, features: dict, num_shards: int
) -> None:
    manifest = token_cache.read_manifest(directory)
    if manifest["fingerprint"] == token_cache.fingerprint(description, features, num_shards):
        return
    was = {**manifest["description"], "features": manifest["features"]}
    now = {**description, "features": features}
    changed = [
        key for key in now if token_cache.canonical(now[key]) != token_cache.canonical(was.get(key))
    ]
    if changed == ["probe"]:
        changed = ["output of the preprocessors (the first records differ)"]
    elif len(manifest["shards"]) != num_shards:
        changed.append("number of shards")
    raise token_cache.CacheMismatchError(
        f"The token cache {directory} was built from something else; changed since: "
        f"{', '.join(changed)}. Rebuild it with `python -m launch.cache --rebuild --gin_file=...`, "
        "or keep both by setting another cache_dir (or $ESPALIER_CACHE)."
    )


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
            lambda shard: read_records(task, split, shard, num_shards),
            features=features,
            description=description,
            num_shards=num_shards,
            on_record=on_record,
        )
