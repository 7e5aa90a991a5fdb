"""The metrics of preference runs by step, as series, as a table and in sentences."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from launch.run import metric_rows
from trainers.preference.indicators import measures
from trainers.preference.indicators.alarm import StoppingRule

Points = dict[int, float]  # step -> value

# Series -> the metrics it may be, of which the first that a run has is taken. `*` is a task; several are averaged.
METRICS = {
    "llh_chosen": ("indicators/llh_chosen", "eval/*/llh/chosen", "llh/chosen"),
    "llh_rejected": ("indicators/llh_rejected", "eval/*/llh/rejected", "llh/rejected"),
    "llh_gap": ("indicators/llh_gap", "eval/*/llh/gap", "llh/gap"),
    "entropy": ("indicators/entropy",),
    "entropy_chosen": ("indicators/entropy_chosen",),
    "mass": ("indicators/mass",),
    "mass_chosen": ("indicators/mass_chosen",),
    "ead": ("indicators/ead",),
    "p_win": ("indicators/p_win",),
    "reward": ("indicators/reward",),
    "kl": ("indicators/kl",),
    "llh_distance": ("indicators/llh_distance",),
    "length": ("indicators/length",),
    "ended": ("indicators/ended",),
    "loss": ("loss",),
    "loss_held_out": ("eval/*/loss",),
    "accuracy": ("accuracy",),
    "accuracy_held_out": ("eval/*/accuracy",),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run on the board.

    Attributes:
      name: unique on the board.
      series: those of METRICS that the run has.
      alarm: the step of its alarm; None for none.
      last: the last step of any series.
    """

    name: str
    series: Mapping[str, Points]
    alarm: int | None
    last: int

    def first(self, name: str) -> float | None:
        """Returns the value at the first step, None for a series that the run lacks."""
        points = self.series.get(name)
        return points[min(points)] if points else None

    def final(self, name: str) -> float | None:
        """Returns the value at the last step."""
        points = self.series.get(name)
        return points[max(points)] if points else None

    def highest(self, name: str) -> tuple[int, float] | None:
        """Returns (step, value) of the maximum, the earliest of equals."""
        points = self.series.get(name)
        return max(points.items(), key=lambda point: (point[1], -point[0])) if points else None


def read(name: str, directory: str | os.PathLike) -> Run:
    """Reads the series of a run.

    Raises:
      FileNotFoundError: the directory holds no metrics.
      ValueError: they are not of preferences.
    """
    rows = metric_rows.read_rows(directory)
    series = {
        name: points for name, choices in METRICS.items() if (points := _points(rows, choices))
    }
    if "llh_chosen" not in series:
        raise ValueError(
            f"{directory} has no likelihoods of chosen completions: give runs of t5x_configs/runs/preference.gin."
        )
    alarms = [row["step"] for row in rows if row.get("indicators/alarm")]
    last = max(max(points) for points in series.values())
    return Run(name=name, series=series, alarm=min(alarms, default=None), last=last)


def _points(rows: Sequence[Mapping[str, Any]], choices: Sequence[str]) -> Points:
    for choice in choices:
        points: Points = {}
        for row in rows:
            # NaN is not equal to itself.
            values = [row[key] for key in row if _is(key, choice) and row[key] == row[key]]
            if values:
                points[row["step"]] = sum(values) / len(values)
        if points:
            return points
    return {}


def _is(key: str, choice: str) -> bool:
    before, star, after = choice.partition("*")
    if not star:
        return key == choice
    middle = key.removeprefix(before).removesuffix(after)
    return key.startswith(before) and key.endswith(after) and "/" not in middle


LEGEND = (
    "LLH is the mean log-likelihood per token of held-out chosen completions, entropy (bits) and mass are of the ten "
    "likeliest tokens where the policy writes, EAD is expectation-adjusted distinct n-grams, KL the mean log-ratio of "
    "policy and reference on what the policy wrote. An arrow goes from the first value to the last, @ names a step."
)
_NONE = "–"


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Returns rows of cells, the header first, without columns that no run has."""
    columns = {
        "run": [run.name for run in runs],
        "steps": [f"{run.last:,}" for run in runs],
        "alarm": [_NONE if run.alarm is None else f"@ {run.alarm:,}" for run in runs],
        "best P_win": [_best(run, "p_win", 3) for run in runs],
        "last P_win": [_number(run.final("p_win"), 3) for run in runs],
        "best reward": [_best(run, "reward", 3) for run in runs],
        "last reward": [_number(run.final("reward"), 3) for run in runs],
        "LLH": [_change(run, "llh_chosen", 2) for run in runs],
        "gap": [_change(run, "llh_gap", 2) for run in runs],
        "highest entropy": [_best(run, "entropy", 2) for run in runs],
        "last entropy": [_number(run.final("entropy"), 2) for run in runs],
        "mass": [_change(run, "mass", 3) for run in runs],
        "EAD": [_change(run, "ead", 2) for run in runs],
        "KL": [_number(run.final("kl"), 1) for run in runs],
        "length": [_change(run, "length", 1) for run in runs],
        "accuracy": [_number(run.final(_accuracy(run)), 2) for run in runs],
    }
    shown = {
        name: cells
        for name, cells in columns.items()
        if name == "alarm" or any(c != _NONE for c in cells)
    }
    return [list(shown), *(list(row) for row in zip(*shown.values(), strict=True))]


def sentence(run: Run) -> str:
    """Returns the verdict of the signals on a run."""
    first, last = run.first("llh_chosen"), run.final("llh_chosen")
    assert first is not None and last is not None  # see `read`
    moved = f"likelihood of chosen completions {_moved(first, last)} nats per token"
    peak, entropy = run.highest("entropy"), run.final("entropy")
    if peak is None or entropy is None:
        return f"{moved}; it has no indicators (t5x_configs/methods/preference/indicators.gin)."
    best = run.highest("p_win") or run.highest("reward")
    kind = "P_win" if run.highest("p_win") else "reward"
    judged = "" if best is None else f"; best {kind} {best[1]:.3f} at step {best[0]:,}"
    first_mass, mass = run.first("mass"), run.final("mass")
    assert first_mass is not None and mass is not None  # written with the entropy
    spread = (
        f"entropy was highest at step {peak[0]:,} ({peak[1]:.2f} bits) and is {entropy:.2f} at the end, mass went from "
        f"{first_mass:.3f} to {mass:.3f}"
    )
    if run.alarm is not None:
        verdict = f"signs of over-optimisation at step {run.alarm:,}, where the alarm was raised"
    elif entropy < (1 - StoppingRule.entropy_drop) * peak[1] and last < first:
        verdict = f"an early warning, for entropy falls since step {peak[0]:,}, and no alarm"
    else:
        verdict = "no sign of over-optimisation"
    return f"{verdict}: {moved}, {spread}{judged}."


def _moved(first: float, last: float) -> str:
    """Returns the change, as far as two digits show it."""
    if f"{first:.2f}" == f"{last:.2f}":
        return f"stayed at {last:.2f}"
    return f"{'fell' if last < first else 'rose'} from {first:.2f} to {last:.2f}"


def length_link(runs: Sequence[Run]) -> str | None:
    """Returns the correlation of likelihood with length of output over all evaluations; None for fewer than three."""
    points = [
        (run.series["llh_chosen"][step], length)
        for run in runs
        for step, length in run.series.get("length", {}).items()
        if step in run.series["llh_chosen"]
    ]
    if len(points) < 3:
        return None
    r = measures.pearson(*zip(*points, strict=True))
    if r != r:
        return None
    return f"length: r = {r:.2f} between likelihood and length of output, over {len(points)} evaluations."


def _accuracy(run: Run) -> str:
    return "accuracy_held_out" if "accuracy_held_out" in run.series else "accuracy"


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def _change(run: Run, name: str, digits: int) -> str:
    first, last = run.first(name), run.final(name)
    return _NONE if first is None else f"{_number(first, digits)} → {_number(last, digits)}"


def _best(run: Run, name: str, digits: int) -> str:
    best = run.highest(name)
    return _NONE if best is None else f"{_number(best[1], digits)} @ {best[0]:,}"
