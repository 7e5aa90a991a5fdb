"""The token cache: the tokenised records of one split of one task, checksummed and memory-mapped.

A cache is a directory. Every shard has, per feature, a `.bin` file with the concatenated values of
all records and a `.len` file with the length of each record (uint32), and one `.json` file with
counts and checksums. `manifest.json` is written last. It holds the fingerprint (a hash of
everything the cache was built from), its readable description, totals, and the checksum of every
file including its own.

data/cache/build.py writes caches, and here they are read.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from espalier.common import files
from espalier.common.storage import paths
from espalier.data import pieces
from espalier.data.cache import blocks, build, cache_dir
from espalier.data.cache.build import FORMAT, MANIFEST
from espalier.data.cache.build import digest as digest  # of settings, as of descriptions
from espalier.data.cache.cache_files import (
    Column,
    Record,
    check_file,
    check_size,
    corrupt,
    feature_dtype,
)

# What to do if a task has changed since its cache was built (data/cache/task_cache.py).
Changed = Literal["refuse", "build", "replace"]


class CacheMismatchError(ValueError):
    """A cache was built from different inputs than the task has now."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """An opened cache."""

    directory: (
        pathlib.Path | str
    )  # the directory of the cache, or its address if it is read in place
    fingerprint: str  # hash of everything the cache was built from
    content: str  # hash of the checksums of all its files, which identifies its content
    columns: dict[str, Column]  # the values of each feature
    manifest: dict  # totals and the description behind the fingerprint

    @property
    def in_place(self) -> bool:
        """Whether it is read in place, in a store, by ranges."""
        return isinstance(self.directory, str)

    @property
    def num_records(self) -> int:
        return self.manifest["records"]

    def tokens(self, feature: str = "targets") -> int:
        return self.manifest["values"][feature]

    def text_bytes(self, feature: str = "targets") -> int | None:
        """Returns the UTF-8 bytes of the text of the tokens; None if any record had no text.

        SeqIO's tokenizer provides the text of `targets` as `targets_pretokenized`. The cache stores
        its size, not the text. Bits per byte are a summed loss divided by this number.
        """
        return self.manifest["text_bytes"][feature] or None

    def name_of(self, record: int, prefix: str = "record ") -> str:
        """Returns the document id of a record, such as FILE:LINE, else `<prefix><number>`."""
        names = self.columns.get("document_id")
        return (names.text(record) if names else "") or f"{prefix}{record}"


def write(
    directory: str | os.PathLike,
    records: Iterable[Record],
    *,
    features: Mapping[str, int | str],
    description: Mapping | None = None,
    num_shards: int = 1,
) -> Cache:
    """Writes a cache of records that are already tokenised, for tests and data outside SeqIO.

    Args:
        directory: the cache to create; it must not exist.
        records: one mapping per record, feature -> values.
        features: feature -> vocabulary size (tokens are checked against it), 'text' for strings, or
            'float32'.
        description: JSON that describes the records; part of the fingerprint.
        num_shards: number of shards; record i goes to shard i % num_shards.
    """
    made = build.Build(
        os.fspath(directory),
        _Listed(tuple(records)),
        "",
        features,
        description or {},
        tuple((piece,) for piece in pieces.parts("", num_shards)),
    )
    made.start()
    for shard in range(num_shards):
        made.write_shard(shard)
    made.finish()
    return open_cache(directory)


@dataclasses.dataclass(frozen=True)
class _Listed:
    """Records in memory, in the order of `write`."""

    all: tuple[Record, ...]

    def records(self, split: str, parts: Sequence[pieces.Piece]) -> Iterator[Record]:
        del split
        for part in parts:
            yield from self.all[part.begin :: part.end]


def open_cache(directory: str | os.PathLike, *, verify: bool = True) -> Cache:
    """Opens a cache; with `verify`, checks every byte against its checksum.

    Of a cache in a store, see `in_place.open_cache`; of large ones, `in_place.open_here`.

    Raises:
        FileNotFoundError: there is no cache.
        CacheCorruptError: a file is missing, truncated, altered or foreign.
    """
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    check_files(directory, manifest, verify)
    columns = {
        feature: Column.open(
            [directory / f"{shard:05d}.{feature}" for shard in range(len(manifest["shards"]))],
            feature_dtype(kind),
        )
        for feature, kind in manifest["features"].items()
    }
    for feature, column in columns.items():
        values = {int(column.bounds[-1]), int(column.lengths.sum(dtype=np.int64))}
        if (len(column.lengths), values) != (manifest["records"], {manifest["values"][feature]}):
            raise corrupt(directory, MANIFEST, f"has wrong counts of feature {feature!r}")
    return Cache(directory, manifest["fingerprint"], manifest["content"], columns, manifest)


def check_files(directory: pathlib.Path, manifest: dict, verify: bool) -> None:
    """Raises CacheCorruptError if a file is missing or has another size; with `verify`, also for a wrong checksum."""
    files = {name: entry for shard in manifest["shards"] for name, entry in shard["files"].items()}
    check = check_file if verify else check_size
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda item: check(directory / item[0], *item[1]), files.items()))


def read_manifest(directory: pathlib.Path) -> dict:
    """Returns the manifest of a cache, after checking it against its own checksum.

    Raises:
        FileNotFoundError: there is no cache.
        CacheCorruptError: the manifest is missing, altered, or of another format.
    """
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if directory.exists():
            raise corrupt(directory, MANIFEST, "is missing") from None
        raise FileNotFoundError(f"There is no token cache at {directory}.") from None
    return parse_manifest(raw, directory)


def parse_manifest(raw: bytes, directory: pathlib.Path | str) -> dict:
    """Returns the manifest of a cache from its bytes; raises CacheCorruptError."""
    try:
        manifest = json.loads(raw)
        body = manifest["body"]
        intact = raw.endswith(b"}\n") and manifest["sha256"] == digest(body)
        intact = intact and body["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise corrupt(
            directory, MANIFEST, f"is altered, or not of a token cache of format {FORMAT}"
        )
    return body


@contextlib.contextmanager
def building_lock(directory: pathlib.Path):
    """Locks `directory` for building; other processes wait until the lock is released."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(directory.name + ".lock"), "w") as lock:
        files.lock(lock, wait=True)
        yield


def remove(directory: pathlib.Path) -> None:
    """Deletes a cache; renames it first, so that an interrupted deletion leaves no partial cache."""
    if directory.exists():
        doomed = directory.with_name(directory.name + ".deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed)


def remove_plans(directory: str | os.PathLike) -> None:
    """Deletes the row plans of a cache, here and in the store; they are made again when they are needed."""
    plans = f"{os.fspath(directory)}.plans"  # see data/stream/stored_plan.py
    local = pathlib.Path(cache_dir.local_root(plans))
    shutil.rmtree(local, ignore_errors=True)
    if address := cache_dir.address_of(local):
        # The indices first: without one, nothing is a plan.
        names = sorted(paths.entries(address), key=lambda name: not name.endswith(blocks.INDEX))
        paths.delete(*(paths.join(address, name) for name in names))
