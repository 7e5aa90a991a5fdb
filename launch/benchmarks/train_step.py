"""Tokens per second of a training step against transformers, eager and compiled.

Both sides start from the same weights, read the same rows, and use AdamW with the same settings; the result has the
losses of both. Fresh processes alternate, so that other load on the machine affects all of them. The result is marked
as contended if other programs used more than 0.3 of a core in a run.
"""

import statistics
import tempfile
from typing import Any

from launch.benchmarks import case, pairs, peers

WARM_UP = 3


def run(*, rounds: int = 5, steps: int = 15) -> dict[str, Any]:
    """Alternates this project, eager and compiled `rounds` times, `steps` timed steps in each."""
    reports: dict[str, list[dict[str, Any]]] = {"ours": [], "eager": [], "compiled": []}
    with tempfile.TemporaryDirectory() as folder:
        case.write(folder, steps=WARM_UP + steps)
        for _ in range(rounds):
            for side in reports:
                reports[side].append(peers.run(side, folder, steps=WARM_UP + steps))
    tokens = case.CASE["batch_size"] * case.CASE["length"]
    seconds, cpu_seconds = (
        {
            side: [statistics.median(r[key][WARM_UP:]) for r in runs]
            for side, runs in reports.items()
        }
        for key in ("seconds", "cpu_seconds")
    )
    best = [min(both) for both in zip(seconds["eager"], seconds["compiled"], strict=True)]
    first = {side: runs[0] for side, runs in reports.items()}
    return {
        "case": case.CASE,
        "speed_over_best_peer": pairs.ratio(best, seconds["ours"]),
        "speed_over_eager": pairs.ratio(seconds["eager"], seconds["ours"]),
        "speed_over_compiled": pairs.ratio(seconds["compiled"], seconds["ours"]),
        "cpu_seconds_eager_over_ours": pairs.ratio(cpu_seconds["eager"], cpu_seconds["ours"]),
        "tokens_per_second": {
            side: [round(tokens / s) for s in values] for side, values in seconds.items()
        },
        "cpu_seconds_per_step": cpu_seconds,
        "losses": {side: run["losses"] for side, run in first.items()},
        "largest_loss_difference": max(
            abs(a - b)
            for a, b in zip(first["ours"]["losses"], first["eager"]["losses"], strict=True)
        ),
        "peak_memory_mb": {side: run["peak_memory_mb"] for side, run in first.items()},
        "other_load_cores": {
            side: [r["other_load"] for r in runs] for side, runs in reports.items()
        },
        "contended": any(
            r["other_load"] > peers.CONTENDED for runs in reports.values() for r in runs
        ),
        "peer_versions": first["eager"]["versions"],
        "tunables": first["ours"]["tunables"],
    }
