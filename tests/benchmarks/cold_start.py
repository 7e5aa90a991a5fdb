"""From process start to the first loss of a training run, cold and with a warm compilation cache.

The peer's first loss needs only a compiled forward pass; this project's first loss needs the whole compiled
training step. The figures are not corrected for this difference.
"""

import os
import tempfile
from typing import Any

from tests.benchmarks import case, compare
from tests.benchmarks.train_step import command

# Side of each start, in the order of a round: a warm start finds the programs of the cold one before.
_STARTS = {
    "ours_cold": "ours",
    "compiled_cold": "compiled",
    "ours_warm": "ours",
    "compiled_warm": "compiled",
    "eager": "eager",
}


def run(*, rounds: int = 3) -> dict[str, Any]:
    """Starts every side `rounds` times, each cold start with empty caches."""
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in _STARTS}
    with tempfile.TemporaryDirectory() as folder:
        case.write_training(folder, steps=1)
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as caches:
                env = {
                    "JAX_COMPILATION_CACHE_DIR": os.path.join(caches, "jax"),
                    "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "torch"),
                }
                for name, side in _STARTS.items():
                    reports[name].append(compare.measured(command(side, folder, 1), env=env))
    seconds = compare.each(reports, "first_loss_s")
    return {
        "cold_over_ours_cold": compare.ratio(seconds["compiled_cold"], seconds["ours_cold"]),
        "cold_over_ours_warm": compare.ratio(seconds["compiled_cold"], seconds["ours_warm"]),
        "warm_over_ours_warm": compare.ratio(seconds["compiled_warm"], seconds["ours_warm"]),
        "ours_warm_over_eager": compare.ratio(seconds["ours_warm"], seconds["eager"]),
        "first_loss_seconds": seconds,
        "first_update_seconds": compare.each(reports, "first_step_s"),
        "other_load_cores": compare.each(reports, "other_load"),
        "contended": compare.contended(reports),
        "peer_versions": reports["eager"][0]["versions"],
    }
