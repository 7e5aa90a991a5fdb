"""What the records of a task's split are made of, as readable JSON: the inputs of a cache's fingerprint.

It covers the source (the bytes of its files, or the `digest` it declares), the vocabulary, every step from examples to
records, and a probe. The probe is the hash of the first records; it detects changes that no description contains.
"""

import functools
import hashlib
import itertools
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.common import versions
from espalier.data.cache import cache_dir as directories
from espalier.data.cache import fingerprint
from espalier.data.cache.cache_files import canonical
from espalier.data.task import DOCUMENT_ID, Task

PROBE_RECORDS = 64


def features_of(task: Any) -> dict[str, int | str]:
    """Returns {output feature of a task, or `document_id`: vocabulary size, 'text' or 'float32'}.

    Raises:
        ValueError: a feature of a SeqIO task is not a vector.
    """
    out: dict[str, int | str] = {
        name: "float32" if "float" in feature.dtype else int(feature.vocabulary.vocab_size)
        for name, feature in task.output_features.items()
    }
    return out | {DOCUMENT_ID: "text"}


def describe(
    task: Any,
    split: str,
    files: fingerprint.FileDigests,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Returns everything that determines the records of a task's split.

    Args:
        task: a `data.task.Task` or a `data.seqio_tasks.SeqioTask`.
        split: one of its splits.
        files: digests of files.
        cache_dir: the root of all caches, where probes of this project's tasks are stored.
    """
    described: dict[str, Any] = {"task": task.name, "split": split}
    if not isinstance(task, Task):
        described["probe"] = probe(task, split)  # first: a TFDS set has no files before it is read
    described |= {
        "source": _source(task.source, split, files),
        "vocabulary": vocabularies_of(task),
        **task.made_by(),
    }
    if "probe" not in described:
        # The records of a template that writes the date change without any change of code or files.
        is_stored = not getattr(task.source, "reads_clock", False)
        described["probe"] = (
            _stored_probe(task, split, described, cache_dir) if is_stored else probe(task, split)
        )
    return described


def vocabularies_of(task: Any) -> dict[str, Any]:
    """Returns the vocabulary, the use of EOS and the dtype of each output feature of a task that has a vocabulary, as JSON."""
    return {
        name: {
            "vocabulary": fingerprint.vocabulary(feature.vocabulary),
            "add_eos": bool(feature.add_eos),
            "dtype": feature.dtype,
        }
        for name, feature in task.output_features.items()
        if feature.vocabulary is not None
    }


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns the keys of what has changed since a cache was built.

    Tasks of this project were once read by SeqIO: descriptions of then have SeqIO's preprocessors instead of steps, and the
    version of TensorFlow instead of the tokeniser's. The probe vouches for the tokeniser.
    """
    if "steps" in now and "preprocessors" in was:
        names = [each.get("partial", each).get("function") for each in was["preprocessors"]]
        steps = next((steps for steps, former in _FORMER.items() if former == names), None)
        was = {**was, "steps": steps, "libraries": now["libraries"]}
    return [key for key in now if canonical(now[key]) != canonical(was.get(key))]


_TEXT = ["seqio.preprocessors.rekey", "seqio.preprocessors.tokenize"]
_EOS = "seqio.preprocessors.append_eos"
# Steps of a task -> the preprocessors by which SeqIO took them.
_FORMER = {
    (): [],
    ("tokenise",): [*_TEXT, _EOS],
    ("tokenise", "bos"): [*_TEXT, "data.tasks.prepend_bos", _EOS],
}


def _stored_probe(
    task: Task, split: str, described: Mapping[str, Any], cache_dir: str | os.PathLike | None
) -> str:
    """Returns `probe`, as it was stored for the same description and code: a start reads no example if nothing has changed."""
    modules = tuple(each.__module__ for each in type(task.source).__mro__)
    key = fingerprint.of_json(
        [described, PROBE_RECORDS, fingerprint.code(task), _surroundings(modules)]
    )
    path = directories.cache_dir("files", "probes", f"{key}.json", override=cache_dir)
    known = directories.recall(path)
    if known is None:
        known = {"probe": probe(task, split)}
        directories.remember(path, known, shared=True)
    return known["probe"]


@functools.cache
def _surroundings(modules: tuple[str, ...]) -> str:
    """Returns a digest of the modules of a source's classes, and of what is installed."""
    imported = map(sys.modules.get, modules)
    files = {pathlib.Path(file) for each in imported if (file := getattr(each, "__file__", None))}
    return fingerprint.of_json([fingerprint.of_code(sorted(files)), versions.own(), sys.version])


def probe(task: Any, split: str) -> str:
    """Returns the hash of the first `PROBE_RECORDS` records that the task yields now."""
    checksum = hashlib.sha256()
    features = features_of(task)
    for record in itertools.islice(task.records(split), PROBE_RECORDS):
        for name in features:
            value = record.get(name, b"")
            data = value if isinstance(value, bytes) else np.asarray(value).tobytes()
            checksum.update(f"{name}:{len(data)}:".encode() + data)
    return checksum.hexdigest()


def _source(source: Any, split: str, files: fingerprint.FileDigests) -> dict[str, Any]:
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
    paths = files_of(source, split)
    out["files"] = [[os.path.basename(path), files.digest(path)] for path in paths]
    return out


def files_of(source: Any, split: str) -> list[str]:
    """Returns the local files that a source reads, as far as it tells."""
    if hasattr(source, "_dataset_fn"):
        return []
    if (tfds := getattr(source, "tfds_dataset", None)) is not None:
        paths = [instruction.filename for instruction in tfds.files(split)]
    else:
        paths = source.list_shards(split)
    return [str(path) for path in paths if os.path.isfile(path)]
