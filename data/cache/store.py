"""The token cache: the tokenised records of one split of one task, checksummed, read by memory map.

A cache is a directory. Every shard has, per feature, a `.bin` file with the values of all records
back to back and a `.len` file with the length of each (uint32), and a `.json` file with counts and
checksums. `manifest.json` is written last and holds the fingerprint (of what the cache was built
from), its readable description, totals, and the checksum of every file including its own.

A build happens in `<directory>.building`, shard by shard: a killed build keeps its finished shards
and ends in the same bytes as an uninterrupted one. The directory appears by one rename.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import numpy as np

from data.cache.cache_dir import sync
from data.cache.cache_files import (
    Record,
    ShardWriter,
    add_known,
    canonical,
    check_file,
    check_size,
    corrupt,
    file_entry,
    finished_shard,
    publish,
)
from data.cache.columns import Column, feature_dtype

FORMAT = 2  # 2: text bytes may be unknown (null)
MANIFEST = "manifest.json"

# What to do where a task has changed since its cache was built (data/cache/task_cache.py).
Changed = Literal["refuse", "build", "replace"]


class CacheMismatchError(ValueError):
    """A cache was built from something else than what is asked for now."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """An opened cache.

    Attributes:
        directory: where it lies.
        fingerprint: hash of everything the cache was built from.
        content: hash of the checksums of all its files: of what it holds.
        columns: the values of each feature.
        manifest: totals and the description behind the fingerprint.
    """

    directory: pathlib.Path
    fingerprint: str
    content: str
    columns: dict[str, Column]
    manifest: dict

    @property
    def num_records(self) -> int:
        return self.manifest["records"]

    def tokens(self, feature: str = "targets") -> int:
        return self.manifest["values"][feature]

    def text_bytes(self, feature: str = "targets") -> int | None:
        """UTF-8 bytes of the text behind the tokens, where all records still carried it, else None.

        SeqIO's tokenizer keeps the text of `targets` as `targets_pretokenized`; it is counted, not
        stored. Divides a summed loss into bits per byte.
        """
        return self.manifest["text_bytes"][feature] or None

    def name_of(self, record: int) -> str:
        """What a record is called, which files of rows have as FILE:LINE; its number where it has no name."""
        names = self.columns.get("document_id")
        return (names.text(record) if names else "") or f"record {record}"


def digest(value) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def fingerprint(description: Mapping, features: Mapping, num_shards: int) -> str:
    """The hash of everything a cache is built from. The shard count fixes the record order."""
    parts = {"format": FORMAT, "features": features, "num_shards": num_shards}
    return digest({**parts, "description": description})


def write(
    directory: str | os.PathLike,
    records: Iterable[Record],
    *,
    features: Mapping[str, int | str],
    description: Mapping | None = None,
    num_shards: int = 1,
) -> Cache:
    """Writes records that are already tokenised, for tests and for data that is not a SeqIO task.

    Args:
        directory: the cache to create; it must not exist.
        records: one mapping per record from feature to tokens.
        features: per feature the vocabulary size (tokens are checked against it), or 'text' for
            strings, or 'float32'.
        description: JSON that tells what the records are; it is hashed into the fingerprint.
        num_shards: record i goes to shard i modulo this.
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
        read_shard: returns the records of one shard, always the same ones in the same order.
        on_record: called with (shard, values written) after every record, for progress.
        directory, features, description, num_shards: see `write`.
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
            done = finished_shard(building, shard)
            if done is None:
                writer = ShardWriter(building, shard, features)
                for record in read_shard(shard):
                    on_record(shard, writer.append(record))
                done = writer.finish()
            shards.append(done)
        _write_manifest(building, name, features, description, shards)
        building.rename(directory)
        stamp.unlink()
        sync(directory.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"No space left while building the token cache {directory}. Free some space, or "
                "set cache_dir or $ESPALIER_CACHE to another disk; finished shards are kept",
            ) from error
        raise
    return open_cache(directory)


def open_cache(directory: str | os.PathLike, *, verify: bool = True) -> Cache:
    """Opens a cache; with `verify` every byte of it is checked against its checksum.

    Raises:
        FileNotFoundError: there is no cache.
        CacheCorruptError: something in it is missing, truncated, altered or foreign.
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
        held = [
            len(column.lengths),
            int(column.bounds[-1]),
            int(column.lengths.sum(dtype=np.int64)),
        ]
        if held != [manifest["records"], *[manifest["values"][feature]] * 2]:
            raise corrupt(directory, MANIFEST, f"does not count what feature {feature!r} holds")
    return Cache(directory, manifest["fingerprint"], manifest["content"], columns, manifest)


def read_manifest(directory: pathlib.Path) -> dict:
    """The manifest of a cache, checked against its own checksum byte for byte."""
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if directory.exists():
            raise corrupt(directory, MANIFEST, "is missing") from None
        raise FileNotFoundError(f"There is no token cache at {directory}.") from None
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
    """Lets one process at a time build `directory`; the others wait and then find it built."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(directory.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove(directory: pathlib.Path) -> None:
    """Deletes a cache; its name goes first, so a killed deletion leaves no half cache."""
    if directory.exists():
        doomed = directory.with_name(directory.name + ".deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed)


def _start_building(building: pathlib.Path, stamp: pathlib.Path, name: str) -> None:
    """Creates the building directory; what another fingerprint left there is thrown away."""
    building.parent.mkdir(parents=True, exist_ok=True)
    if not stamp.exists() or stamp.read_bytes() != name.encode():
        shutil.rmtree(building, ignore_errors=True)
        publish(stamp, name.encode())
    building.mkdir(exist_ok=True)


def _write_manifest(building, name, features, description, shards) -> None:
    for shard, entry in enumerate(shards):
        # The entry as it stands in the shard's own file, which is checked like any other.
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
    publish(building / MANIFEST, _manifest_bytes(body))


def _manifest_bytes(body: Mapping) -> bytes:
    manifest = {"body": body, "sha256": digest(body)}
    return json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=True).encode() + b"\n"
