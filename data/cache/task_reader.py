"""Describes and reads a SeqIO task: the inputs of its token cache.

The fingerprint of a cache covers the source (the bytes of its files, or the `digest` it declares),
the vocabulary, every preprocessor, TensorFlow's version, an optional `task.version`, and a probe.
The probe is the hash of the first 64 records; it detects changes that no description contains.
Random preprocessors draw their numbers when the cache is built, from seed 0.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator

import numpy as np

from espalier.data.cache import fingerprint

PROBE_RECORDS = 64
DOCUMENT_ID = "document_id"
_BYTES_PER_SHARD = 32_000_000  # of source files, as stored (possibly compressed)
_RECORDS_PER_SHARD = 20_000
_MAX_SHARDS = 64


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


def num_shards(task, split: str) -> int:
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
