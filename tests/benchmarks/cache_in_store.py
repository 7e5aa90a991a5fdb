"""Eight hosts at once on this machine, each fed its rows from a cache of 1 TB that is read in place in a store 50 ms away.

The store is a small server (range_store.py) of one process; every shard of the cache is a link to the same files, of real
random tokens, which are verified as any others. The index of its rows is calculated, so that a row costs about as many requests
as it has documents; a smaller cache is read with its index in the store too. Start is from a new process to the first batch. What the readers and the store need of the processor is counted
apart, because here they share it; hosts of a pod do not.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from espalier.data.cache import blocks, build, in_place, store
from espalier.data.cache.cache_files import canonical
from espalier.data.stream import rows
from espalier.data.stream.plan import Plan, make_plan
from espalier.data.stream.train_stream import Stream
from tests.benchmarks import compare
from tests.benchmarks.virtual_source import Periodic

CASE: dict[str, Any] = {
    "shards": 8000,
    "shard_tokens": 64_000_000,  # of two bytes
    "latency_s": 0.05,
    "hosts": 8,
    "rows_per_host": 32,
    "length": 2048,
    "packing": "concat",
    "seconds": 20.0,  # of a measurement
    "index": "calculated",  # or "stored"
}
_TINY: dict[str, Any] = {
    "shards": 5,
    "shard_tokens": 100_000,
    "hosts": 2,
    "rows_per_host": 2,
    "length": 256,
    "seconds": 0.5,
}
# The smaller cache: more shards than are planned in memory, and ten times the blocks that a process keeps.
_SMALLER = {"shards": 80, "shard_tokens": 4_000_000, "index": "stored"}
_NAME = "cache"
_BUCKET = "bucket"
VOCABULARY = 2**16


def run(*, tiny: bool = False) -> dict[str, Any]:
    """Feeds one host alone, then all at once; for rows of concatenated documents, and for packed ones."""
    sizes = {**CASE, **(_TINY if tiny else {})}
    with tempfile.TemporaryDirectory() as folder:
        terabytes = write(pathlib.Path(folder), sizes) / 1e12
        packed = {**sizes, "packing": "best_fit"}
        smaller = {**sizes, **_SMALLER, **({"shard_tokens": 10_000} if tiny else {})}
        there = pathlib.Path(folder, "smaller")
        write(there, smaller)
        _open(smaller, store.open_cache(there / _BUCKET / _NAME, verify=False))  # plans its rows
        return {
            "case": sizes,
            "terabytes": terabytes,
            "all_hosts": _feed(folder, sizes, sizes["hosts"]),
            "one_host": _feed(folder, sizes, 1),
            "one_host_best_fit": _feed(folder, packed, 1),
            "one_host_index_in_store": _feed(str(there), smaller, 1),
        }


def write(folder: pathlib.Path, sizes: Mapping[str, Any]) -> int:
    """Writes the cache; returns its bytes."""
    rng = np.random.default_rng(0)
    lengths_N = np.clip(rng.lognormal(6.0, 1.2, sizes["shard_tokens"] // 400), 1, 200_000)
    lengths_N = lengths_N.astype("<u4")
    lengths_N = lengths_N[np.cumsum(lengths_N, dtype=np.int64) <= sizes["shard_tokens"]]
    tokens = rng.integers(0, VOCABULARY, lengths_N.sum(), np.uint16)
    there = folder / _BUCKET / _NAME
    there.mkdir(parents=True)
    files = {"targets.bin": tokens.tobytes(), "targets.len": lengths_N.tobytes()}
    for name, data in files.items():
        (folder / f"all.{name}").write_bytes(data)
    table, _ = blocks.table_of(folder, [f"all.{name}" for name in files])
    (folder / "all.blocks").write_bytes(table)
    entries = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    shards = []
    for shard in range(sizes["shards"]):
        for name in (*files, "blocks"):
            (there / f"{shard:05d}.{name}").symlink_to(folder / f"all.{name}")
        shards.append(
            {
                "records": len(lengths_N),
                "values": {"targets": len(tokens)},
                "text_bytes": {"targets": None},
                "files": {f"{shard:05d}.{name}": entry for name, entry in entries.items()},
            }
        )
        (there / f"{shard:05d}.json").write_bytes(canonical(shards[-1]))
    body = build._manifest("of a benchmark", {"targets": VOCABULARY}, {}, shards)
    (there / store.MANIFEST).write_bytes(build.manifest_bytes(body))
    blocks.write_index(there, blocks.groups_of(body["shards"]), of=body["content"])
    return sizes["shards"] * sum(size for size, _ in entries.values())


def client(url: str) -> dict[str, str]:
    """Returns the variables of a process that reads from the store."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "of-the-benchmark",
        "AWS_SECRET_ACCESS_KEY": "hush-of-the-benchmark",  # pragma: allowlist secret
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def _serving(folder: str, latency: float) -> Iterator[tuple[str, int]]:
    """Yields the address of a store of a folder, and its process."""
    command = [sys.executable, "-m", "tests.benchmarks.range_store", folder, f"--latency={latency}"]
    process = subprocess.Popen(
        command, cwd=compare.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.kill()
        process.wait()


def _feed(folder: str, sizes: Mapping[str, Any], hosts: int) -> dict[str, Any]:
    """Runs so many hosts at once; returns the report of each, and the share of a core that the store needs."""
    with contextlib.ExitStack() as stack:
        url, pid = stack.enter_context(_serving(folder, sizes["latency_s"]))
        command = compare.ours("cache_in_store", url, json.dumps({**sizes, "folder": folder}))
        sides = [stack.enter_context(compare.side([*command, str(host)])) for host in range(hosts)]
        with concurrent.futures.ThreadPoolExecutor(hosts) as pool:
            starts = list(pool.map(lambda side: side.ask("start"), sides))
            before, began = _cpu_seconds(pid), time.perf_counter()
            fed = list(pool.map(lambda side: side.ask("feed"), sides))
            cores = (_cpu_seconds(pid) - before) / (time.perf_counter() - began)
    return {
        "hosts": [{**start, **rates} for start, rates in zip(starts, fed, strict=True)],
        "slowest_million_tokens_per_s": min(rates["million_tokens_per_s"] for rates in fed),
        "cores_of_the_store": cores,
        "load": os.getloadavg()[0],
    }


def _cpu_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_stream(sizes: Mapping[str, Any], address: str) -> Stream:
    """Returns the stream of a cache that is read in place."""
    source = _open(sizes, in_place.open_cache(address))
    batch_size = sizes["hosts"] * sizes["rows_per_host"]
    return Stream([source], ((0, {"text": 1.0}),), batch_size=batch_size)


def _open(sizes: Mapping[str, Any], cache: store.Cache) -> rows.Source:
    """Returns the rows of a cache; a calculated index is that of one shard, repeated."""
    if sizes["index"] == "stored":
        lengths = {"targets": sizes["length"]}
        return rows.plan_source("text", cache, lengths, packing=sizes["packing"])
    shards = len(cache.manifest["shards"])
    lengths_N = np.fromfile(pathlib.Path(sizes["folder"], "all.targets.len"), "<u4")
    one = make_plan({"targets": lengths_N}, {"targets": sizes["length"]}, packing=sizes["packing"])
    starts_N = np.cumsum(lengths_N, dtype=np.int64) - lengths_N

    def repeat(first: np.ndarray, stride: int = 0, more: int = 0) -> Any:
        return Periodic(first.astype(np.int64), shards * len(first) + more, stride)

    whole: Plan = dataclasses.replace(
        one,
        row_starts=repeat(one.row_starts[:-1], len(one.records), more=1),
        records=repeat(one.records, len(lengths_N)),
        offsets=repeat(one.offsets),
        lengths={"targets": repeat(one.lengths["targets"])},
        begins={"targets": repeat(starts_N[one.records] + one.offsets, int(lengths_N.sum()))},
    )
    return rows.Source("text", cache, whole)


class Host:
    """One host of a training run: it reads its own rows of every global batch."""

    def __init__(self, url: str, sizes: Mapping[str, Any], host: int):
        os.environ.update(client(url))
        self._sizes, self._step = sizes, 0
        self._rows = host * sizes["rows_per_host"], (host + 1) * sizes["rows_per_host"]

    def start(self) -> dict[str, Any]:
        """Opens the cache and reads a batch; returns seconds since the process started, which include imports."""
        began = time.perf_counter()
        self._stream = open_stream(self._sizes, f"s3://{_BUCKET}/{_NAME}")
        opened = time.perf_counter() - began
        self._read()
        return {
            "open_s": opened,
            "first_batch_s": time.perf_counter() - began - opened,
            "since_start_s": _age(),
        }

    def feed(self) -> dict[str, Any]:
        """Returns million tokens/s, megabytes of memory at the peak (RSS) and now (PSS), and million tokens/s of a core."""
        until = time.perf_counter() + self._sizes["seconds"] / 2
        while time.perf_counter() < until:  # until batches are read far enough ahead
            self._read()
        tokens, began, cpu = 0, time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - began) < self._sizes["seconds"] or not tokens:
            tokens += self._read()
        cpu = time.process_time() - cpu
        return {
            "million_tokens_per_s": tokens / passed / 1e6,
            "million_tokens_per_core_s": tokens / cpu / 1e6,
            "batches_ahead": self._stream._ahead.depth if self._stream._ahead else 0,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            "pss_mb": _pss_megabytes(),
        }

    def _read(self) -> int:
        batch = self._stream.batch(self._step, *self._rows)
        self._step += 1
        return int(np.count_nonzero(batch["decoder_segment_ids"]))


def _pss_megabytes() -> float:
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


def _age() -> float:
    """Returns seconds since this process started."""
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def side(url: str, sizes: str, host: str) -> None:
    """Answers requests on standard input until it ends; see compare.Side."""
    operations = Host(url, json.loads(sizes), int(host))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(operations, request.pop("op"))(**request)), flush=True)
