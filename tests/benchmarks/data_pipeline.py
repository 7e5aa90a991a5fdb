"""The input pipeline on one core: packed tokens per second, and the time of a batch at step 10^9.

Two sources with log-normal document lengths are written to a temporary cache. They are read back as a training run
reads them: as packed rows of a mixture with two phases. Padding is not counted.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from espalier.data.cache import store
from espalier.data.stream import rows
from espalier.data.stream.train_stream import Stream

LENGTHS = (512, 2048, 8192)
PHASES = ((0, {"text": 0.7, "code": 0.3}), (2000, {"text": 0.5, "code": 0.5}))
FAR_STEP = 10**9


def run(*, million_tokens: int = 40, batch_size: int = 64, repeats: int = 9) -> dict:
    """Writes the caches, reads them back, and returns figures with median, minimum and maximum.

    Args:
      million_tokens: size of the corpus; the first source has two thirds of it.
      batch_size: rows per batch.
      repeats: measurements per figure, each of at least four million tokens at different steps.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with tempfile.TemporaryDirectory() as root:
            caches, written = _timed(lambda: _write_caches(root, million_tokens))
            figures: dict[str, Any] = {
                "tokens": sum(cache.tokens() for cache in caches.values()),
                "write_s": written,
                "open_and_verify_s": _timed(
                    lambda: [store.open_cache(cache.directory) for cache in caches.values()]
                )[1],
            }
            for length in LENGTHS:
                figures[f"length_{length}"] = _bench_length(caches, length, batch_size, repeats)
    finally:
        os.sched_setaffinity(0, cores)
    return {**figures, "batch_size": batch_size, "cores": 1}


def _bench_length(caches: dict, length: int, batch_size: int, repeats: int) -> dict[str, Any]:
    sources, planned = _timed(
        lambda: [rows.plan_source(name, made, {"targets": length}) for name, made in caches.items()]
    )
    made, started = _timed(lambda: Stream(sources, PHASES, batch_size=batch_size))
    steps = max(10, 4_000_000 // (length * batch_size))
    _, first = _timed(lambda: made.batch(FAR_STEP, 0, batch_size))
    rates, far = [], []
    for repeat in range(repeats):
        begin = time.perf_counter()
        tokens = 0.0
        for step in range(repeat * steps, (repeat + 1) * steps):
            batch = made.batch(step, 0, batch_size)
            tokens += int(np.count_nonzero(batch["decoder_segment_ids"]))
        rates.append(tokens / (time.perf_counter() - begin) / 1e6)
        far.append(_timed(lambda r=repeat: made.batch(FAR_STEP + r, 0, batch_size))[1] * 1e3)
    return {
        "fill": [source.plan.fill() for source in sources],
        "plan_s": planned,
        "schedule_s": started,
        "million_tokens_per_s": _spread(rates),
        "first_batch_at_1e9_ms": first * 1e3,
        "batch_at_1e9_ms": _spread(far),
    }


def _write_caches(root: str, million_tokens: int) -> dict[str, store.Cache]:
    rng = np.random.default_rng(0)
    caches = {}
    for name, share, median in (("text", 2 / 3, 6.0), ("code", 1 / 3, 7.0)):
        lengths, total = [], 0
        while total < share * million_tokens * 1e6:
            lengths.append(min(int(rng.lognormal(median, 1.2)) + 1, 200_000))
            total += lengths[-1]
        caches[name] = store.write(
            os.path.join(root, name),
            ({"targets": rng.integers(1, 32_000, length)} for length in lengths),
            features={"targets": 32_000},
            num_shards=4,
        )
    return caches


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
