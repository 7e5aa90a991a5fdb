"""From process start to the first loss of a training run, cold and with a warm compilation cache.

The peer's first loss needs only a compiled forward pass; this project's first loss needs the whole compiled
training step. The figures are not corrected for this difference. This project starts with and without the store of
compiled programs (ESPALIER_PROGRAMS), each with caches of its own.
"""

import os
import tempfile
from collections.abc import Mapping
from typing import Any

from tests.benchmarks import case, compare
from tests.benchmarks.train_step import command

# Side and variables of each start, in the order of a round: a warm start finds the programs of the cold one before.
_STARTS: dict[str, tuple[str, Mapping[str, str]]] = {
    "ours_cold": ("ours", compare.TRACED),
    "ours_cold_stored": ("ours", compare.STORED),
    "compiled_cold": ("compiled", {}),
    "ours_warm": ("ours", compare.TRACED),
    "ours_warm_stored": ("ours", compare.STORED),
    "compiled_warm": ("compiled", {}),
    "eager": ("eager", {}),
}


def run(*, rounds: int = 3) -> dict[str, Any]:
    """Starts every side `rounds` times, each cold start with empty caches."""
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in _STARTS}
    with tempfile.TemporaryDirectory() as folder:
        case.write_training(folder, steps=1)
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as caches:
                for name, (side, switch) in _STARTS.items():
                    jax_folder = "stored" if switch is compare.STORED else "traced"
                    env = {
                        "JAX_COMPILATION_CACHE_DIR": os.path.join(caches, jax_folder),
                        "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "torch"),
                        **switch,
                    }
                    reports[name].append(compare.measured(command(side, folder, 1), env=env))
    seconds = compare.each(reports, "first_loss_s")
    ratios: dict[str, Any] = {}
    for store in ("", "_stored"):
        cold, warm = (seconds[f"ours_{cache}{store}"] for cache in ("cold", "warm"))
        ratios |= {
            f"cold_over_ours_cold{store}": compare.ratio(seconds["compiled_cold"], cold),
            f"cold_over_ours_warm{store}": compare.ratio(seconds["compiled_cold"], warm),
            f"warm_over_ours_warm{store}": compare.ratio(seconds["compiled_warm"], warm),
            f"ours_warm{store}_over_eager": compare.ratio(warm, seconds["eager"]),
        }
    return {
        **ratios,
        "first_loss_seconds": seconds,
        "first_update_seconds": compare.each(reports, "first_step_s"),
        "other_load_cores": compare.each(reports, "other_load"),
        "contended": compare.contended(reports),
        "peer_versions": reports["eager"][0]["versions"],
    }
