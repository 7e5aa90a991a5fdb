"""Tokens per second of a training step against transformers, eager and compiled.

Both sides start from the same weights, read the same rows, and use AdamW with the same settings; the result has the
losses of both. Fresh processes alternate, so that other load on the machine affects all of them. The result is marked
as contended if other programs used more than 0.3 of a core in a run.
"""

import statistics
import tempfile
from collections.abc import Mapping
from typing import Any

from tests.benchmarks import case, compare

WARM_UP = 3
SIDES = ("ours", "eager", "compiled")
Reports = Mapping[str, list[dict[str, Any]]]


def run(*, rounds: int = 5, steps: int = 15) -> dict[str, Any]:
    """Alternates this project, eager and compiled `rounds` times, `steps` timed steps in each."""
    with tempfile.TemporaryDirectory() as folder:
        case.write_training(folder, steps=WARM_UP + steps)
        reports = compare.alternate_processes(
            {side: command(side, folder, WARM_UP + steps) for side in SIDES}, rounds
        )
    seconds = medians(reports, "seconds", WARM_UP)
    cpu_seconds = medians(reports, "cpu_seconds", WARM_UP)
    return {
        "case": case.CASE,
        **speeds(seconds),
        "cpu_seconds_eager_over_ours": compare.ratio(cpu_seconds["eager"], cpu_seconds["ours"]),
        "cpu_seconds_per_step": cpu_seconds,
        **facts(reports, seconds, case.CASE["batch_size"] * case.CASE["length"]),
        "other_load_cores": compare.each(reports, "other_load"),
        "tunables": reports["ours"][0]["tunables"],
    }


def medians(reports: Reports, key: str, warm_up: int) -> dict[str, list[float]]:
    """Returns the median over the steps after the warm-up, of every run by side."""
    return compare.each(reports, lambda report: statistics.median(report[key][warm_up:]))


def least(values: Mapping[str, list[float]]) -> list[float]:
    """Returns the lower value of the peer's two modes, of every round."""
    return [min(both) for both in zip(values["eager"], values["compiled"], strict=True)]


def speeds(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Returns the ratios of the peer's seconds, in its faster mode and in each, over ours."""
    peers = {"best_peer": least(seconds), **{side: seconds[side] for side in SIDES[1:]}}
    return {f"speed_over_{name}": compare.ratio(x, seconds["ours"]) for name, x in peers.items()}


def facts(reports: Reports, seconds: Mapping[str, list[float]], tokens: int) -> dict[str, Any]:
    """Returns figures of steps of `tokens` tokens besides the ratios; losses of the first two sides are compared."""
    first = {side: runs[0] for side, runs in reports.items()}
    ours, peer, *_ = first.values()
    return {
        "tokens_per_second": {
            side: [round(tokens / s) for s in values] for side, values in seconds.items()
        },
        "losses": {side: run["losses"] for side, run in first.items()},
        "largest_loss_difference": compare.largest_difference(ours["losses"], peer["losses"]),
        "peak_memory_mb": {side: run["peak_memory_mb"] for side, run in first.items()},
        "contended": compare.contended(reports),
        "peer_versions": peer["versions"],
    }


def command(side: str, folder: str, steps: int) -> list[str]:
    """Returns the command of a side: 'ours', or a mode of llama_torch.py for the peer.

    Raises:
      PeerError: the peer is not installed.
    """
    if side == "ours":
        return compare.ours("jax.llama_jax", folder, steps)
    return compare.peer("torch/llama_torch.py", "train", folder, side, steps)
