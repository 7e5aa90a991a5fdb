"""From process start to the first training step and to generated tokens, with stored programs and with traced ones.

Both sides are this project and alternate in fresh processes on one folder of compiled programs, which a first process of each has
filled: the side without stored programs (ESPALIER_PROGRAMS=0) traces, and reads what XLA has compiled from jax's cache.
"""

import functools
import os
import tempfile
import time
from typing import Any

from tests.benchmarks import case, compare

PROMPT = list(range(100, 116))
_SIDES = {"traced": compare.TRACED, "stored": compare.STORED}


def run(*, rounds: int = 5) -> dict[str, Any]:
    """Alternates both sides `rounds` times, for each kind of start."""
    with tempfile.TemporaryDirectory() as folder:
        case.write_training(folder, steps=1)
        commands = {
            "train": (compare.ours("jax.llama_jax", folder, 1), "first_step_s", "losses"),
            "generate": (compare.ours("stored_programs", folder), "first_tokens_s", "tokens"),
        }
        caches = os.path.join(folder, "programs")
        figures = {
            kind: _compare(*of_kind, caches=caches, rounds=rounds)
            for kind, of_kind in commands.items()
        }
    contended = any(figure.pop("contended") for figure in figures.values())
    return {**figures, "contended": contended}


def _compare(
    command: list[str], key: str, result: str, *, caches: str, rounds: int
) -> dict[str, Any]:
    env = {"JAX_COMPILATION_CACHE_DIR": caches}
    calls = {
        side: functools.partial(compare.measured, command, env=env | switch)
        for side, switch in _SIDES.items()
    }
    reports: dict[str, list[compare.Report]] = compare.alternate(calls, rounds, warm_up=1)
    seconds = compare.each(reports, key)
    cpu_seconds = compare.each(reports, "process_cpu_s")
    results = [report[result] for of_one in reports.values() for report in of_one]
    return {
        "traced_over_stored": compare.ratio(seconds["traced"], seconds["stored"]),
        # Of whole processes; other programs change it less than the time.
        "cpu_traced_over_stored": compare.ratio(cpu_seconds["traced"], cpu_seconds["stored"]),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "same_results": all(result == results[0] for result in results),
        "contended": compare.contended(reports),
    }


def side(folder: str) -> dict[str, Any]:
    """Generates eight tokens in this process."""
    from espalier.launch.run.load import load

    (generated,) = load(os.path.join(folder, "model")).generate([PROMPT], max_new_tokens=8)
    seconds = time.time() - float(os.environ["BENCH_PROCESS_START"])
    return {"first_tokens_s": seconds, "tokens": generated.tokens}
