"""Eight hosts at once on this machine, each fed its rows of packed batches from an index of 10^11 tokens: tokens/s and memory.

Every host is a process with a stream of its own, and reads its rows of each global batch, as the hosts of a training run
do. The index and the tokens of both sources are calculated (virtual_source.py), so that no such files are needed; all
else is the stream of training. Rates are measured at the beginning and at the end of an epoch. Padding is not counted.
"""

import concurrent.futures
import contextlib
import json
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.data.stream.train_stream import Stream
from tests.benchmarks import compare, virtual_source

CASE: dict[str, Any] = {
    "tokens": 10**11,
    "hosts": 8,
    "rows_per_host": 32,
    "length": 2048,
    "records": 4096,  # of a period of a source
    "seconds": 10.0,  # of a measurement
}
_TINY: dict[str, Any] = {
    "hosts": 2,
    "rows_per_host": 4,
    "length": 64,
    "records": 64,
    "seconds": 0.1,
}
PHASES = ((0, {"text": 0.7, "code": 0.3}), (2000, {"text": 0.5, "code": 0.5}))
SMALL_INDEX = 10**8


def run(*, tiny: bool = False) -> dict[str, Any]:
    """Feeds all hosts at once, then one host alone, then one host from an index of 10^8 tokens."""
    sizes = {**CASE, **(_TINY if tiny else {})}
    hosts = _feed(sizes, range(sizes["hosts"]))
    alone = _feed(sizes, [0])
    small = _feed({**sizes, "tokens": SMALL_INDEX}, [0])
    return {
        "case": sizes,
        "all_hosts": hosts,
        "one_host": alone,
        "one_host_of_the_small_index": small,
        "slowest_host_million_tokens_per_s": min(
            host[place] for host in hosts for place in ("begin", "end")
        ),
        # Of a process after all batches, with the larger index over the smaller.
        "peak_memory_over_small_index": alone[0]["peak_mb"] / small[0]["peak_mb"],
    }


def _feed(sizes: Mapping[str, Any], hosts: Any) -> list[dict[str, Any]]:
    """Runs these hosts at once; returns the report of each."""
    command = compare.ours("data_loader", json.dumps(dict(sizes)))
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(compare.side([*command, str(host)])) for host in hosts]
        with concurrent.futures.ThreadPoolExecutor(len(sides)) as pool:
            list(pool.map(lambda side: side.ask("ready"), sides))
            return list(pool.map(lambda side: side.ask("feed"), sides))


def make_stream(sizes: Mapping[str, Any]) -> Stream:
    """Returns the stream of one host: two sources with log-normal lengths of records, in two phases."""
    rng = np.random.default_rng(0)
    sources = []
    for name, share, median in (("text", 2 / 3, 6.0), ("code", 1 / 3, 7.0)):
        drawn_N = rng.lognormal(median, 1.2, sizes["records"]).astype(np.int64)
        sources.append(
            virtual_source.make(
                name,
                np.clip(drawn_N, 1, 200_000),
                row_length=sizes["length"],
                tokens=int(share * sizes["tokens"]),
            )
        )
    return Stream(sources, PHASES, batch_size=sizes["hosts"] * sizes["rows_per_host"])


class Host:
    """One host of a training run: it reads its own rows of every global batch."""

    def __init__(self, sizes: Mapping[str, Any], host: int):
        self._seconds = sizes["seconds"]
        self._stream = make_stream(sizes)
        rows = sizes["rows_per_host"]
        self._rows = host * rows, (host + 1) * rows

    def ready(self) -> dict[str, Any]:
        """Reads one batch, so that all hosts begin together."""
        self._stream.batch(0, *self._rows)
        return {}

    def feed(self) -> dict[str, Any]:
        """Returns million tokens/s at the beginning and the end of an epoch, and megabytes before and at the peak."""
        before = _peak_megabytes()
        last = self._stream.steps_for_epochs(1.0)
        return {
            "begin": self._rate(0),
            "end": self._rate(max(0, last - 1000)),
            "last_step": last,
            "before_mb": before,
            "peak_mb": _peak_megabytes(),
        }

    def _rate(self, step: int) -> float:
        tokens, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < self._seconds or not tokens:
            batch = self._stream.batch(step, *self._rows)
            tokens += int(np.count_nonzero(batch["decoder_segment_ids"]))
            step += 1
        return tokens / passed / 1e6


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def side(sizes: str, host: str) -> None:
    """Answers requests on standard input until it ends; see compare.Side."""
    operations = Host(json.loads(sizes), int(host))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(operations, request.pop("op"))(**request)), flush=True)
