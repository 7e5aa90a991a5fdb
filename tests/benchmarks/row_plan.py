"""Row plans of a trillion tokens: planning by the shard, and reading rows with little memory.

A cache of 10^9 generated documents and 10^12 tokens is made of hard links to a few shards, whose tokens are holes of sparse files.
Some shards are planned, as all would be. The plan of the whole cache is then a sparse file too, with the entries of those rows
that are read, and another process opens both and reads batches at steps from 10^9 on; then one reads them in a store 50 ms away.
"""

import contextlib
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.common.storage import paths
from espalier.data.cache import blocks, build, in_place, pool, store
from espalier.data.cache.cache_files import canonical
from espalier.data.stream import order, rows, stored_plan
from espalier.data.stream.plan import make_plan, policy_of
from espalier.data.stream.train_stream import Stream
from tests.benchmarks import cache_in_store, compare

VOCABULARY = 32_000
LENGTH = 2048
BATCH = 64
_MEDIAN, _SPREAD, _LONGEST = 6.19, 1.2, 200_000  # log-normal, 1,000 tokens on average
_TEMPLATES = 4
_STEPS = 48
_LATENCY = 0.05  # of the store, s
_POLICY: dict[str, Any] = {"packing": "best_fit", "long_documents": "split", "inputs_prefix": ()}


def run(*, tiny: bool = False) -> dict:
    """Makes the cache, plans a part of it, and reads from the whole; returns figures.

    Args:
      tiny: whether to make 10^6 documents in place of 10^9.
    """
    shards, records, planned = (70, 15_000, 70) if tiny else (15_625, 64_000, 256)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        whole = make_cache(pathlib.Path(folder, "bucket", "whole"), shards, records)
        part = make_cache(pathlib.Path(folder, "part"), planned, records)
        figures: dict[str, Any] = {"documents": whole.num_records, "tokens": whole.tokens()}
        figures["make_s"] = time.perf_counter() - began
        with contextlib.ExitStack() as stack:
            stack.enter_context(_more_than(0))
            for workers in (1, pool.size()):
                stack.enter_context(pool.limited(workers))
                figures[f"plan_{workers}"] = _planned(part, shards)
        steps = range(10**9, 10**9 + _STEPS)
        _sparse_plan(whole, steps)
        here = compare.ours("row_plan", str(whole.directory), steps.start)
        figures["read"] = compare.measured(here)
        with cache_in_store._serving(folder, _LATENCY) as (url, _):
            there = compare.ours("row_plan", "s3://bucket/whole", steps.start)
            figures["read_in_store"] = compare.measured(there, env=cache_in_store.client(url))
    return figures


def make_cache(folder: pathlib.Path, shards: int, records: int) -> store.Cache:
    """Returns a cache of shards that are links to a few; its tokens are holes."""
    folder.mkdir(parents=True)
    kinds = [_shard(folder, kind, records) for kind in range(_TEMPLATES)]
    entries = [kinds[shard % _TEMPLATES] for shard in range(shards)]
    numbered = []
    for number, entry in enumerate(entries):
        files = {f"{number:05d}.{end}": size for end, size in entry["files"].items()}
        for end in (*entry["files"], "blocks"):
            os.link(folder / f"kind{number % _TEMPLATES}.{end}", folder / f"{number:05d}.{end}")
        numbered.append({**entry, "files": files})
    body = {
        "format": build.FORMAT,
        "fingerprint": "generated",
        "description": {},
        "features": {"targets": VOCABULARY},
        "records": sum(entry["records"] for entry in entries),
        "values": {"targets": sum(entry["values"]["targets"] for entry in entries)},
        "text_bytes": {"targets": None},
        "shards": numbered,
        "content": build.digest([entry["files"] for entry in numbered]),
    }
    blocks.write_index(folder, blocks.groups_of(numbered), of=body["content"])
    (folder / build.MANIFEST).write_bytes(build.manifest_bytes(body))
    return in_place.open_cache(folder)


def _shard(folder: pathlib.Path, kind: int, records: int) -> dict:
    lengths_N = _lengths(kind, records)
    stem, values = f"kind{kind}", int(lengths_N.sum(dtype=np.int64))
    (folder / f"{stem}.targets.len").write_bytes(lengths_N.tobytes())
    with open(folder / f"{stem}.targets.bin", "wb") as file:
        file.truncate(2 * values)
    ends = ("targets.bin", "targets.len")
    table, found = blocks.table_of(folder, [f"{stem}.{end}" for end in ends])
    (folder / f"{stem}.blocks").write_bytes(table)
    sizes = {end: list(found[f"{stem}.{end}"]) for end in ends}
    return {"records": records, "values": {"targets": values}, "files": sizes}


def _lengths(kind: int, records: int) -> np.ndarray:
    drawn = np.random.default_rng(kind).lognormal(_MEDIAN, _SPREAD, records)
    return np.minimum(drawn.astype(np.int64) + 1, _LONGEST).astype("<u4")


@contextlib.contextmanager
def _more_than(shards: int):
    before, stored_plan.IN_MEMORY = stored_plan.IN_MEMORY, shards
    try:
        yield
    finally:
        stored_plan.IN_MEMORY = before


def _planned(cache: store.Cache, shards: int) -> dict[str, float]:
    """Plans a cache; returns seconds, bytes, and what they are for `shards` shards like its own."""
    store.remove_plans(cache.directory)
    began, used = time.perf_counter(), _processor_seconds()
    source = rows.plan_source("part", cache, {"targets": LENGTH}, verify=False)
    seconds, used = time.perf_counter() - began, _processor_seconds() - used
    (folder,) = pathlib.Path(f"{cache.directory}.plans").glob("*/")
    size = sum(path.stat().st_size for path in folder.iterdir())
    here = len(cache.manifest["shards"])
    return {
        "shards": here,
        "s": seconds,
        "s_per_shard_and_core": used / here,
        "core_hours_of_all": used / here * shards / 3600,
        "gigabytes_of_all": size / here * shards / 1e9,
        "bytes_per_document": size / cache.num_records,
        "fill": source.plan.fill(),
    }


def _processor_seconds() -> float:
    every = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(getattr(resource.getrusage(who), key) for who in every for key in ("ru_utime", "ru_stime"))  # fmt: skip


def _sparse_plan(cache: store.Cache, steps: Sequence[int]) -> None:
    """Writes the files of the whole plan, of which only the rows of some steps are no holes."""
    shards = len(cache.manifest["shards"])
    lengths = [_lengths(kind, cache.manifest["shards"][0]["records"]) for kind in range(_TEMPLATES)]
    plans = [make_plan({"targets": lengths_N}, {"targets": LENGTH}) for lengths_N in lengths]
    # Rows, segments, records and values of each kind of shard, and of all shards before each.
    counts = [(p.num_rows, len(p.records), len(n), int(n.sum())) for p, n in zip(plans, lengths, strict=True)]  # fmt: skip
    before = np.cumsum([(0, 0, 0, 0), *(counts[shard % _TEMPLATES] for shard in range(shards))], 0)
    num_rows, segments = before[-1, :2].tolist()

    name = stored_plan.name_of(cache, policy_of({"targets": LENGTH}, **_POLICY))
    folder = pathlib.Path(f"{cache.directory}.plans", name)
    folder.mkdir(parents=True)
    row_starts = np.memmap(folder / "row_starts", "<i8", "w+", shape=(num_rows + 1,))
    dtype = stored_plan.segment_dtype(["targets"])
    made = np.memmap(folder / "segments", dtype, "w+", shape=(segments,))
    records = np.memmap(folder / "records", "<u4", "w+", shape=(segments,))
    facts = {"counts": {}, "tokens": {"targets": cache.tokens()}, "first_long": None}
    (folder / stored_plan.INDEX).write_bytes(canonical(facts))
    positions = (np.array(steps)[:, None] * BATCH + np.arange(BATCH)).reshape(-1)
    for row in np.unique(order.shuffled_rows(positions, num_rows, 0, "whole")[1]).tolist():
        shard = int(np.searchsorted(before[:, 0], row, side="right")) - 1
        rows_before, segments_before, records_before, values_before = before[shard].tolist()
        plan, lengths_N = plans[shard % _TEMPLATES], lengths[shard % _TEMPLATES]
        here = slice(*plan.row_starts[row - rows_before : row - rows_before + 2].tolist())
        there = slice(here.start + segments_before, here.stop + segments_before)
        row_starts[row : row + 2] = there.start, there.stop
        starts_N = np.cumsum(lengths_N, dtype=np.int64) - lengths_N
        begins = starts_N[plan.records[here]] + plan.offsets[here] + values_before
        made["targets.begin"][there] = begins
        made["targets.length"][there] = plan.lengths["targets"][here]
        made["offset"][there] = plan.offsets[here]
        records[there] = plan.records[here] + np.uint32(records_before)
    for array in (row_starts, made, records):
        array.flush()
    _write_checksums(folder, name)


def _write_checksums(folder: pathlib.Path, name: str) -> None:
    """Writes the checksums of sparse files without reading their holes."""
    hole, table, sizes = blocks.checksum(bytes(blocks.BYTES)), b"", {}
    for file in ("row_starts", "segments", "records", stored_plan.INDEX):
        with open(folder / file, "rb") as content:
            sizes[file] = size = os.fstat(content.fileno()).st_size
            sums = bytearray(hole * blocks.number(size))
            at = 0
            while at < size:
                try:
                    at = os.lseek(content.fileno(), at, os.SEEK_DATA) // blocks.BYTES * blocks.BYTES
                except OSError:  # only holes follow
                    at = (size - 1) // blocks.BYTES * blocks.BYTES
                place = at // blocks.BYTES * blocks.SUM
                content.seek(at)
                sums[place : place + blocks.SUM] = blocks.checksum(content.read(blocks.BYTES))
                at += blocks.BYTES
            table += bytes(sums)
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (folder / "plan.sums").write_bytes(table)
    blocks.write_index(folder, {"plan.sums": sizes}, of=name)


def side(place: str, first_step: str) -> dict[str, Any]:
    """Opens a cache and its plan, here or in a store, and reads batches, as a process of its own."""
    began = time.perf_counter()
    in_store = paths.is_remote(place)
    cache = (
        in_place.open_cache(place)
        if in_store
        else in_place.open_here(pathlib.Path(place), verify=False)
    )
    opened = time.perf_counter()
    plan = stored_plan.open_plan(cache, {"targets": LENGTH}, verify=False, **_POLICY)
    planned = time.perf_counter()
    source = rows.Source("whole", cache, plan)
    stream = Stream([source], ((0, {"whole": 1.0}),), batch_size=BATCH)
    made = time.perf_counter()
    times = []
    for step in range(int(first_step), int(first_step) + _STEPS):
        before = time.perf_counter()
        filled = stream.batch(step, 0, BATCH)["decoder_segment_ids"] > 0
        times.append(time.perf_counter() - before)
        assert filled.mean() > 0.99, "the rows are not there"
    return {
        "open_cache_s": opened - began,
        "open_plan_s": planned - opened,
        "schedule_s": made - planned,
        "first_batch_ms": 1e3 * times[0],
        "median_batch_ms": 1e3 * float(np.median(times)),
        "million_tokens_per_s": BATCH * LENGTH * _STEPS / 2 / sum(times[_STEPS // 2 :]) / 1e6,
        "resident_mb": _resident_mb("VmRSS"),
        "resident_mb_without_pages_of_files": _resident_mb("RssAnon"),
    }


def _resident_mb(kind: str) -> float:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) / 1e3
