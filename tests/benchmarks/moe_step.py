"""A training step of a small Mixtral against transformers with the same weights, rows and optimiser, float32.

There are two mixtures: 8 experts of width 512 and 64 experts of width 128, top-2 routing. Each has a balanced router and
a skewed router, which sends most tokens to few experts. transformers has several implementations of experts. Each is
timed with the balanced router first; the fastest one then alternates with this project, in fresh processes.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

from tests.benchmarks import compare, moe_case
from tests.benchmarks.train_step import command, facts, medians

WARM_UP = 2
# batched_mm is excluded: it gathers a kernel for every (token, expert) choice, 8.6 GB for one product here.
FORMS = ("eager", "grouped_mm", "grouped_mm+compiled")


def run(
    *, rounds: int = 3, steps: int = 4, names: Sequence[str] = ("8_experts", "64_experts")
) -> dict[str, Any]:
    """Alternates both sides `rounds` times on each mixture, `steps` timed steps in each."""
    own = {name: moe_case.MIXTURES[name] for name in names}
    result: dict[str, Any] = {"case": {**moe_case.SIZES, "mixtures": own}}
    for name in names:
        tried: dict[str, float] = {}
        for routing in moe_case.ROUTINGS:
            with tempfile.TemporaryDirectory() as folder:
                total = WARM_UP + steps
                moe_case.write(folder, name=name, routing=routing, steps=total)
                for form in () if tried else FORMS:
                    report = compare.measured(command(form, folder, WARM_UP + 1))
                    tried[form] = report["seconds"][WARM_UP]
                best = min(FORMS, key=lambda form: tried[form])
                result[f"{name}_{routing}"] = _compare(folder, best, rounds, total)
        result[f"{name}_seconds_by_form"] = tried
    return result


def _compare(folder: str, form: str, rounds: int, steps: int) -> dict[str, Any]:
    """Compares both sides on one mixture with one routing."""
    commands = {side: command(side, folder, steps) for side in ("ours", form)}
    reports = compare.alternate_processes(commands, rounds)
    seconds = medians(reports, "seconds", WARM_UP)
    cpu_seconds = medians(reports, "cpu_seconds", WARM_UP)
    return {
        "peer_form": form,
        "speed_over_peer": compare.ratio(seconds[form], seconds["ours"]),
        "cpu_seconds_peer_over_ours": compare.ratio(cpu_seconds[form], cpu_seconds["ours"]),
        **facts(reports, seconds, moe_case.SIZES["batch_size"] * moe_case.SIZES["length"]),
    }
