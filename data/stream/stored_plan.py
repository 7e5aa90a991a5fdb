"""Row plans of large caches: made shard by shard, stored once, and read in place.

A cache of up to `IN_MEMORY` shards is planned in memory whenever it is opened. The plan of a larger one is a folder beside it,
`<cache>.plans/<digest of content and policy>`. Its rows are those of the cache's first shard, then those of the second, and so on.

  row_starts  int64 [R + 1]
  segments    [S], for each segment where its tokens begin in the columns, how many they are, and its offset in the record
  records     [S], the record of each segment, which only the ids of documents need
  plan.json   counts and sums; and checksums of all, see data/cache/blocks.py

Any process can plan a shard, from the lengths of its records alone. The files of shards that are complete wait in
`<digest>.building`, so that whoever goes on after a stop begins with the next; at the end they are joined. A row is read from
two places of the disk or store, besides its tokens, and no memory grows with the cache.

Shape suffixes: N records of a shard, S segments, R rows.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import files
from espalier.common.bars import Bar
from espalier.common.storage import paths
from espalier.data.cache import blocks, cache_dir, pool, store
from espalier.data.cache.block_folder import BlockFolder
from espalier.data.cache.cache_files import (
    canonical,
    corrupt,
    file_entry,
    finished_shard,
    mapped,
    writing,
)
from espalier.data.cache.ranged import RangedArray
from espalier.data.stream.plan import (
    LOSS_WEIGHTS,
    Plan,
    check_loss_weights,
    make_plan,
    policy_of,
    record_dtype,
)

IN_MEMORY = 64  # shards of a cache that is planned in memory
INDEX = "plan.json"
_ARRAYS = ("row_starts", "segments", "records")
_TABLE = "plan.sums"
# Part of the name of a plan: raise it when the same cache and policy give other files.
_VERSION = 2
_CHECKED_AT_ONCE = 1 << 19  # values


class Field:
    """One field of an array of structures, as an array; the structures may be in a file or in a store."""

    def __init__(self, array: Any, name: str, total: int = 0):
        self._array, self._name, self._total = array, name, total

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> Any:
        return self._array[index][self._name]

    def sum(self, dtype: Any = np.int64) -> int:
        """Returns the sum of all values, which is stored."""
        return int(np.array(self._total, dtype))


def segment_dtype(features: Sequence[str]) -> np.dtype:
    """Returns the structure of a segment; its size is a power of two, so that none is in two blocks."""
    fields = [(f"{feature}.begin", "<i8") for feature in features]
    fields += [(f"{feature}.length", "<u4") for feature in features]
    fields += [("offset", "<u4")]
    size = np.dtype(fields).itemsize
    padding = (1 << (size - 1).bit_length()) - size
    return np.dtype([*fields, *([("padding", f"V{padding}")] if padding else [])])


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard of a cache: its number, its first record and values in the whole cache, and the checksums of its files."""

    number: int
    first_record: int
    first_values: Mapping[str, int]
    files: Mapping[str, list]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanBuild:
    """Makes a plan; pickled for other processes.

    Attributes:
      name: digest of the cache's content and the policy.
      cache: folder or address of the cache.
      folder: where the files of complete shards wait.
      weighted: whether the cache has loss weights, which are checked too.
      records: number of records of the cache.
      row_lengths, packing, long_documents, inputs_prefix: see `plan.make_plan`.
    """

    name: str
    cache: str
    folder: pathlib.Path
    weighted: bool
    records: int
    row_lengths: dict[str, int]
    packing: str
    long_documents: str
    inputs_prefix: tuple[int, ...]

    def write_shard(
        self, shard: Shard, report: Callable[[int], None] = lambda shards: None
    ) -> None:
        """Plans one shard, unless that is done, and reports 1.

        Raises:
          ValueError: the records cannot be planned so, or their loss weights do not fit; names the shard.
          CacheCorruptError: the cache is damaged.
          OSError: a file cannot be read or written.
        """
        if finished_shard(self.folder, shard.number) is None:
            lengths = {f: self._read(shard, f"{f}.len", "<u4") for f in self.row_lengths}
            where = f"Shard {shard.number + 1} of {self.cache}"
            weights = None
            if self.weighted:
                weights = self._read(shard, f"{LOSS_WEIGHTS}.bin", "<f4")
                check_loss_weights(
                    f"{where}: feature {LOSS_WEIGHTS!r}",
                    lengths["targets"],
                    self._read(shard, f"{LOSS_WEIGHTS}.len", "<u4"),
                    [weights],
                )
            try:
                planned = make_plan(
                    lengths,
                    self.row_lengths,
                    packing=self.packing,
                    long_documents=self.long_documents,
                    inputs_prefix=self.inputs_prefix,
                )
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            with writing(f"{where}: its row plan"):
                self._write(shard, planned, lengths, weights)
        report(1)

    def _read(self, shard: Shard, name: str, dtype: str) -> np.ndarray:
        name = f"{shard.number:05d}.{name}"
        data = paths.read(paths.join(self.cache, name))
        if file_entry(data) != list(shard.files[name]):
            raise corrupt(pathlib.Path(self.cache), name, "does not match its checksum")
        return np.frombuffer(data, dtype)

    def _write(
        self,
        shard: Shard,
        planned: Plan,
        lengths: Mapping[str, np.ndarray],
        weights: np.ndarray | None,
    ) -> None:
        segments_S = np.zeros(len(planned.records), segment_dtype(list(lengths)))
        segments_S["offset"] = planned.offsets
        for feature, lengths_N in lengths.items():
            starts_N = np.cumsum(lengths_N, dtype=np.int64) - lengths_N
            begins_S = starts_N[planned.records] + planned.offsets
            segments_S[f"{feature}.begin"] = begins_S + shard.first_values[feature]
            segments_S[f"{feature}.length"] = planned.lengths[feature]
        records_S = planned.records.astype(np.int64) + shard.first_record
        records_S = records_S.astype(record_dtype(self.records))
        stem, entries = f"{shard.number:05d}", {}
        made = (planned.row_starts[:-1], segments_S, records_S)
        for name, array in zip(_ARRAYS, made, strict=True):
            content = array.tobytes()
            files.write(self.folder / f"{stem}.{name}", content, synced=False)
            entries[f"{stem}.{name}"] = file_entry(content)
        first = planned.first_long
        tokens: dict[str, float] = {feature: planned.tokens(feature) for feature in lengths}
        if weights is not None:
            totals = np.concatenate([[0], np.cumsum(weights, dtype=np.float64)])
            begins_S = segments_S["targets.begin"] - shard.first_values["targets"]
            ends_S = begins_S + planned.lengths["targets"]
            tokens[LOSS_WEIGHTS] = float((totals[ends_S] - totals[begins_S]).sum())
        entry = {
            "files": entries,  # a file that a power cut has emptied does not fit its checksum
            "segments": len(segments_S),
            "tokens": tokens,
            "counts": planned.counts,
            "first_long": None if first is None else first + shard.first_record,
        }
        files.write(self.folder / f"{stem}.json", canonical(entry), synced=False)

    def finish(self, target: pathlib.Path, num_shards: int) -> None:
        """Joins the files of all shards in a folder.

        Raises:
          CacheCorruptError: a file is not what was written.
          OSError: a file cannot be read or written.
        """
        stems = [f"{shard:05d}" for shard in range(num_shards)]
        entries = [json.loads((self.folder / f"{stem}.json").read_bytes()) for stem in stems]
        bounds = np.cumsum([0, *(entry["segments"] for entry in entries)], dtype="<i8")
        written: dict[str, list] = {}
        for name in _ARRAYS:
            checksum, size = hashlib.sha256(), 0
            with open(target / name, "wb") as out:
                for content in self._contents(name, stems, entries, bounds):
                    checksum.update(content)
                    size += out.write(content)
            written[name] = [size, checksum.hexdigest()]
        long = [entry["first_long"] for entry in entries if entry["first_long"] is not None]
        sums = {key: collections.Counter[str]() for key in ("tokens", "counts")}
        for entry in entries:
            for key, total in sums.items():
                total.update(entry[key])
        facts = canonical({**sums, "first_long": min(long, default=None)})
        files.write(target / INDEX, facts, synced=True)
        written[INDEX] = file_entry(facts)
        sizes = {name: size for name, (size, _) in written.items()}
        blocks.write_index(target, {_TABLE: sizes}, of=self.name, written=written)

    def _contents(
        self, name: str, stems: Sequence[str], entries: Sequence[Mapping], bounds: np.ndarray
    ) -> Iterator[bytes]:
        """Yields the parts of an array of the plan, which are compared with their checksums."""
        for stem, entry, before in zip(stems, entries, bounds[:-1], strict=True):
            content = (self.folder / f"{stem}.{name}").read_bytes()
            if file_entry(content) != list(entry["files"][f"{stem}.{name}"]):
                raise corrupt(self.folder, f"{stem}.{name}", "does not match its checksum")
            if name == "row_starts":
                content = (np.frombuffer(content, "<i8") + before).tobytes()
            yield content
        if name == "row_starts":
            yield bounds[-1:].tobytes()


def name_of(cache: store.Cache, policy: list) -> str:
    """Returns the name of a plan, for a policy as `plan.policy_of` gives it."""
    return store.digest([_VERSION, cache.content, policy])[:16]


def is_needed(cache: store.Cache) -> bool:
    """Returns whether the rows of a cache are planned shard by shard."""
    return len(cache.manifest["shards"]) > IN_MEMORY


def open_plan(
    cache: store.Cache,
    row_lengths: Mapping[str, int],
    *,
    packing: str,
    long_documents: str,
    inputs_prefix: tuple[int, ...],
    verify: bool = True,
) -> Plan:
    """Returns the stored plan of a cache; makes it if it is not there.

    Args:
      cache: the cache.
      row_lengths, packing, long_documents, inputs_prefix: see `plan.make_plan`.
      verify: check every byte of a plan on this machine. What is read from a store is always checked.

    Raises:
      ValueError: the records cannot be planned so.
      CacheCorruptError: the plan or the cache is damaged.
      OSError: the plan cannot be written.
    """
    how: dict[str, Any] = {
        "row_lengths": dict(row_lengths),
        "packing": packing,
        "long_documents": long_documents,
        "inputs_prefix": inputs_prefix,
    }
    name = name_of(cache, policy_of(**how))
    folder = f"{cache.directory}.plans"
    place, in_place = paths.join(folder, name), paths.is_remote(folder)
    directory = pathlib.Path(cache_dir.local_root(folder), name)  # where it is built

    index = paths.join(place, blocks.INDEX)
    if not paths.exists(index):
        build = PlanBuild(
            name=name,
            cache=os.fspath(cache.directory),
            folder=directory.with_name(f"{name}.building"),
            weighted=LOSS_WEIGHTS in cache.columns,
            records=cache.num_records,
            **how,
        )
        with writing(f"The row plan {place}"):
            build.folder.mkdir(parents=True, exist_ok=True)
        with store.building_lock(directory):
            if not paths.exists(index):  # another process may have made it meanwhile
                make = functools.partial(_make, build, list(_shards(cache)))
                expected = (*_ARRAYS, INDEX, _TABLE, blocks.INDEX)
                cache_dir.build_directory(directory, make, expected=expected, in_place=in_place)
            shutil.rmtree(build.folder, ignore_errors=True)
    arrays, facts = _opened(place, name, cache.num_records, list(row_lengths), verify)
    segments: Any = arrays["segments"]
    fields: Any = functools.partial(Field, segments)
    return Plan(
        row_starts=arrays["row_starts"],
        records=arrays["records"],
        offsets=fields("offset"),
        lengths={f: fields(f"{f}.length", facts["tokens"][f]) for f in row_lengths},
        begins={f: fields(f"{f}.begin") for f in row_lengths},
        counts=facts["counts"],
        first_long=facts["first_long"],
        loss_tokens=facts["tokens"].get(LOSS_WEIGHTS),
        **how,
    )


def _make(build: PlanBuild, shards: Sequence[Shard], target: pathlib.Path) -> None:
    title = f"planning the rows of {build.cache}"
    with Bar(desc=title, total=len(shards), unit="shard", file=sys.stderr) as bar:
        name_of = lambda shard: f"The row plan of shard {shard.number + 1} of {build.cache}"  # noqa: E731
        needed = (build.cache, str(build.folder))
        pool.run(build.write_shard, shards, what=name_of, bar=bar, title=title, paths=needed)
    with writing(f"The row plan {target}"):
        build.finish(target, len(shards))


def _shards(cache: store.Cache) -> Iterator[Shard]:
    record, values = 0, dict.fromkeys(cache.manifest["features"], 0)
    for number, entry in enumerate(cache.manifest["shards"]):
        yield Shard(number, record, values, entry["files"])
        record += entry["records"]
        values = {feature: values[feature] + entry["values"][feature] for feature in values}


def _opened(
    place: str | os.PathLike, name: str, records: int, features: Sequence[str], verify: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of a plan, and what `plan.json` says."""
    folder = BlockFolder(place, of=name)
    dtypes = (np.dtype("<i8"), segment_dtype(features), record_dtype(records))
    arrays = {n: RangedArray(folder, [n], dtype) for n, dtype in zip(_ARRAYS, dtypes, strict=True)}
    facts = json.loads(RangedArray(folder, [INDEX], np.dtype("u1"))[:].tobytes())
    if paths.is_remote(place):
        return arrays, facts
    here: dict[str, np.ndarray] = {}
    for n, array in arrays.items():
        path = pathlib.Path(place, n)
        size = array.dtype.itemsize * len(array)
        if not path.exists() or path.stat().st_size != size:
            raise corrupt(pathlib.Path(place), n, f"is missing, or has not {size} bytes")
        if verify:
            with concurrent.futures.ThreadPoolExecutor(blocks.THREADS) as threads:
                check = functools.partial(_check, array)
                list(threads.map(check, range(0, len(array), _CHECKED_AT_ONCE)))
        here[n] = mapped(path, array.dtype)
    return here, facts


def _check(array: RangedArray, begin: int) -> None:
    array[begin : begin + _CHECKED_AT_ONCE]  # raises for a block with another checksum
