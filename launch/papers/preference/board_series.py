"""What the metrics of a preference run say, by step."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from launch.run import metric_rows

Points = dict[int, float]  # step -> value

# Names of series, and of the metrics that they are, of which the first that a run has is taken. `*` stands for a task;
# of several it is their mean.
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
      name: told apart from the others'.
      series: those of METRICS that it has.
      alarm: the step of its alarm; None for none.
      last: the last step of which there is anything.
    """

    name: str
    series: Mapping[str, Points]
    alarm: int | None
    last: int

    def first(self, name: str) -> float | None:
        """The value at the first step, None for a series that the run lacks."""
        points = self.series.get(name)
        return points[min(points)] if points else None

    def final(self, name: str) -> float | None:
        """The value at the last step."""
        points = self.series.get(name)
        return points[max(points)] if points else None

    def highest(self, name: str) -> tuple[int, float] | None:
        """(step, value) of the largest, the earliest of equals."""
        points = self.series.get(name)
        return max(points.items(), key=lambda point: (point[1], -point[0])) if points else None


def read(name: str, directory: str | os.PathLike) -> Run:
    """The series of a run.

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
        found: Points = {}
        for row in rows:
            names = [key for key in row if _is(key, choice)]
            values = [row[key] for key in names if row[key] == row[key]]  # NaN is left out
            if values:
                found[row["step"]] = sum(values) / len(values)
        if found:
            return found
    return {}


def _is(key: str, choice: str) -> bool:
    before, star, after = choice.partition("*")
    if not star:
        return key == choice
    middle = key.removeprefix(before).removesuffix(after)
    return key.startswith(before) and key.endswith(after) and "/" not in middle
