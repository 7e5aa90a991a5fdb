"""From process start to the first loss of a training run, cold and with a warm compilation cache.

The peer's first loss needs only a compiled forward pass; this project's first loss needs the whole compiled
training step. The figures are not corrected for this difference.
"""

import os
import tempfile
from typing import Any

from launch.benchmarks import case, pairs, peers


def run(*, rounds: int = 3) -> dict[str, Any]:
    """Starts every side `rounds` times, each cold start with empty caches."""
    reports: dict[str, list[dict[str, Any]]] = {}

    def start(name: str, side: str, folder: str, caches: str) -> None:
        env = {
            "JAX_COMPILATION_CACHE_DIR": os.path.join(caches, "jax"),
            "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "torch"),
        }
        reports.setdefault(name, []).append(peers.run(side, folder, steps=1, env=env))

    with tempfile.TemporaryDirectory() as folder:
        case.write(folder, steps=1)
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as caches:
                start("ours_cold", "ours", folder, caches)
                start("compiled_cold", "compiled", folder, caches)
                start("ours_warm", "ours", folder, caches)
                start("compiled_warm", "compiled", folder, caches)
                start("eager", "eager", folder, caches)
    seconds = {name: [r["first_loss_s"] for r in runs] for name, runs in reports.items()}
    compiled = seconds["compiled_cold"]
    return {
        "cold_over_ours_cold": pairs.ratio(compiled, seconds["ours_cold"]),
        "cold_over_ours_warm": pairs.ratio(compiled, seconds["ours_warm"]),
        "warm_over_ours_warm": pairs.ratio(seconds["compiled_warm"], seconds["ours_warm"]),
        "first_loss_seconds": seconds,
        "first_update_seconds": {n: [r["first_step_s"] for r in rs] for n, rs in reports.items()},
        "other_load_cores": {n: [r["other_load"] for r in rs] for n, rs in reports.items()},
        "contended": any(r["other_load"] > peers.CONTENDED for rs in reports.values() for r in rs),
        "peer_versions": reports["eager"][0]["versions"],
    }
