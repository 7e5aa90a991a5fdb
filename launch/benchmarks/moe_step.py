"""A training step of a small Mixtral against transformers with the same weights, rows and optimiser, float32.

There are two mixtures: 8 experts of width 512 and 64 experts of width 128, top-2 routing. Each has a balanced router and
a skewed router, which sends most tokens to few experts. transformers has several implementations of experts. Each is
timed with the balanced router first; the fastest one then alternates with this project, in fresh processes.
"""

import statistics
import tempfile
from typing import Any

from launch.benchmarks import compare, moe_case
from launch.benchmarks.train_step import command

WARM_UP = 2
# batched_mm is excluded: it gathers a kernel for every (token, expert) choice, 8.6 GB for one product here.
FORMS = ("eager", "grouped_mm", "grouped_mm+compiled")


def run(*, rounds: int = 3, steps: int = 4) -> dict[str, Any]:
    """Alternates both sides `rounds` times on each mixture, `steps` timed steps in each."""
    report: dict[str, Any] = {"case": {**moe_case.SIZES, "mlp_dim": moe_case.HIDDEN}}
    for experts in moe_case.HIDDEN:
        tried: dict[str, float] = {}
        for routing in moe_case.ROUTINGS:
            with tempfile.TemporaryDirectory() as folder:
                total = WARM_UP + steps
                moe_case.write(folder, experts=experts, routing=routing, steps=total)
                for form in () if tried else FORMS:
                    tried[form] = _seconds(compare.measured(command(form, folder, WARM_UP + 1)))
                best = min(FORMS, key=lambda form: tried[form])
                report[f"{experts}_experts_{routing}"] = _compare(folder, best, rounds, total)
        report[f"{experts}_experts_seconds_by_form"] = tried
    return report


def _compare(folder: str, form: str, rounds: int, steps: int) -> dict[str, Any]:
    """Compares both sides on one mixture with one routing."""
    commands = {side: command(side, folder, steps) for side in ("ours", form)}
    reports = compare.alternate_processes(commands, rounds)
    seconds = compare.each(reports, _seconds)
    cpu_seconds = compare.each(reports, lambda report: _seconds(report, "cpu_seconds"))
    tokens = moe_case.SIZES["batch_size"] * moe_case.SIZES["length"]
    losses = {side: runs[0]["losses"] for side, runs in reports.items()}
    return {
        "peer_form": form,
        "speed_over_peer": compare.ratio(seconds[form], seconds["ours"]),
        "cpu_seconds_peer_over_ours": compare.ratio(cpu_seconds[form], cpu_seconds["ours"]),
        "tokens_per_second": {
            side: [round(tokens / s) for s in values] for side, values in seconds.items()
        },
        "losses": losses,
        "largest_loss_difference": compare.largest_difference(*losses.values()),
        "peak_memory_mb": {side: runs[0]["peak_memory_mb"] for side, runs in reports.items()},
        "contended": compare.contended(reports),
        "peer_versions": reports[form][0]["versions"],
    }


def _seconds(report: dict[str, Any], key: str = "seconds") -> float:
    return statistics.median(report[key][WARM_UP:])
