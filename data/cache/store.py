"""The token cache: the tokenised records of one split of one task, checksummed and memory-mapped.

A cache is a directory. Every shard has, per feature, a `.bin` file with the concatenated values of
all records and a `.len` file with the length of each record (uint32), and one `.json` file with
counts and checksums. `manifest.json` is written last. It holds the fingerprint (a hash of
everything the cache was built from), its readable description, totals, and the checksum of every
file including its own.

A build writes to `<directory>.building`, shard by shard. An interrupted build continues after its
finished shards and produces the same bytes as an uninterrupted build. One rename publishes the
cache.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import numpy as np

from espalier.common import files
from espalier.data.cache.cache_files import (
    Column,
    Record,
    ShardWriter,
    add_known,
    canonical,
    check_file,
    check_size,
    corrupt,
    feature_dtype,
    file_entry,
    finished_shard,
)

FORMAT = 2  # 2: text bytes may be unknown (null)
MANIFEST = "manifest.json"

# What to do if a task has changed since its cache was built (data/cache/task_cache.py).
Changed = Literal["refuse", "build", "replace"]


class CacheMismatchError(ValueError):
    """A cache was built from different inputs than the task has now."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """An opened cache."""

    directory: pathlib.Path  # the directory of the cache
    fingerprint: str  # hash of everything the cache was built from
    content: str  # hash of the checksums of all its files, which identifies its content
    columns: dict[str, Column]  # the values of each feature
    manifest: dict  # totals and the description behind the fingerprint

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


def digest(value) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def fingerprint(description: Mapping, features: Mapping, num_shards: int) -> str:
    """Returns the hash of everything a cache is built from; shards determine the order of records."""
    inputs = {"format": FORMAT, "features": features, "num_shards": num_shards}
    return digest({**inputs, "description": description})


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
    records = list(records)
    return build(
        directory,
        lambda shard: iter(records[shard::num_shards]),
        features=features,
        description=description or {},
        num_shards=num_shards,
    )


def build(
    directory: str | os.PathLike,
    read_shard: Callable[[int], Iterator[Record]],
    *,
    features: Mapping[str, int | str],
    description: Mapping,
    num_shards: int,
    on_record: Callable[[int, int], None] = lambda shard, values: None,
) -> Cache:
    """Builds a cache atomically, continuing an interrupted build of the same fingerprint.

    Args:
        read_shard: shard -> its records, always the same records in the same order.
        on_record: called with (shard, values written) after every record, for progress.
        directory, features, description, num_shards: see `write`.

    Raises:
        FileExistsError: the directory exists.
        OSError: the disk is full, or a file cannot be written.
    """
    directory = pathlib.Path(directory)
    if directory.exists():
        raise FileExistsError(f"The token cache {directory} exists already; delete it to rebuild.")
    name = fingerprint(description, features, num_shards)
    building = directory.with_name(directory.name + ".building")
    stamp = directory.with_name(directory.name + ".fingerprint")
    try:
        _start_building(building, stamp, name)
        shards = []
        for shard in range(num_shards):
            entry = finished_shard(building, shard)
            if entry is None:
                writer = ShardWriter(building, shard, features)
                for record in read_shard(shard):
                    on_record(shard, writer.append(record))
                entry = writer.finish()
            shards.append(entry)
        _write_manifest(building, name, features, description, shards)
        building.rename(directory)
        stamp.unlink()
        files.sync(directory.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"No space left while building the token cache {directory}. Free some space, or "
                "set cache_dir or $ESPALIER_CACHE to another disk; finished shards are reused",
            ) from error
        raise
    return open_cache(directory)


def open_cache(directory: str | os.PathLike, *, verify: bool = True) -> Cache:
    """Opens a cache; with `verify`, checks every byte against its checksum.

    Raises:
        FileNotFoundError: there is no cache.
        CacheCorruptError: a file is missing, truncated, altered or foreign.
    """
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    files = {name: entry for shard in manifest["shards"] for name, entry in shard["files"].items()}
    check = check_file if verify else check_size
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda item: check(directory / item[0], *item[1]), files.items()))
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


def parse_manifest(raw: bytes, directory: pathlib.Path) -> dict:
    """Returns the manifest of a cache from its bytes; raises CacheCorruptError."""
    try:
        manifest = json.loads(raw)
        body = manifest["body"]
        intact = raw == _manifest_bytes(body) and body["format"] == FORMAT
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


def _start_building(building: pathlib.Path, stamp: pathlib.Path, name: str) -> None:
    """Creates the building directory; deletes the files of a build with another fingerprint."""
    building.parent.mkdir(parents=True, exist_ok=True)
    if not stamp.exists() or stamp.read_bytes() != name.encode():
        shutil.rmtree(building, ignore_errors=True)
        files.write(stamp, name, synced=True)  # what `building` holds is trusted because of it
    building.mkdir(exist_ok=True)


def _write_manifest(building, name, features, description, shards) -> None:
    for shard, entry in enumerate(shards):
        # The checksum of the shard's own .json file, which is checked like any other file.
        own = {f"{shard:05d}.json": file_entry(canonical(entry))}
        entry["files"] = {**entry["files"], **own}
    body = {
        "format": FORMAT,
        "fingerprint": name,
        "description": description,
        "features": dict(features),
        "records": sum(shard["records"] for shard in shards),
        **{
            key: {f: add_known(*(shard[key][f] for shard in shards)) for f in features}
            for key in ("values", "text_bytes")
        },
        "shards": shards,
        "content": digest([shard["files"] for shard in shards]),
    }
    files.write(building / MANIFEST, _manifest_bytes(body), synced=True)


def _manifest_bytes(body: Mapping) -> bytes:
    manifest = {"body": body, "sha256": digest(body)}
    return json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=True).encode() + b"\n"
