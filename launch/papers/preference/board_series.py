"""The metrics of preference runs by step, as series, as a table and in sentences."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

import pandas as pd

from launch.reporting.labels import number
from launch.run import metric_rows
from trainers.preference.indicators import samples
from trainers.preference.indicators.alarm import StoppingRule

# Series -> metrics, of which the first that a run has is used. `*` is a task; several are averaged.
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


# Of a reading. With fewer, the entropy of outputs moves by more than the rule's threshold by chance.
FEWEST_OUTPUTS = 16


@dataclasses.dataclass(frozen=True)
class Run:
    """One run on the board.

    Attributes:
      name: unique on the board.
      series: name in METRICS, of those that the run has -> values by step.
      alarm: the step of its alarm; None for none.
      outputs: number of outputs of the policy in a reading; None if it is unknown.
    """

    name: str
    series: Mapping[str, pd.Series]
    alarm: int | None
    outputs: int | None = None

    @property
    def last(self) -> int:
        """The last step of any series."""
        return max(points.index[-1] for points in self.series.values())

    def first(self, name: str) -> float | None:
        """Returns the value at the first step, None for a series that the run lacks."""
        return self.series[name].iloc[0] if name in self.series else None

    def final(self, name: str) -> float | None:
        """Returns the value at the last step."""
        return self.series[name].iloc[-1] if name in self.series else None

    def highest(self, name: str) -> tuple[int, float] | None:
        """Returns (step, value) of the maximum, the earliest of equals."""
        if (points := self.series.get(name)) is None:
            return None
        return int(points.idxmax()), points.max()


def read(name: str, directory: str | os.PathLike) -> Run:
    """Reads the series of a run.

    Raises:
      FileNotFoundError: the directory holds no metrics.
      ValueError: they are not of preferences.
    """
    rows = metric_rows.read_rows(directory) or [{"step": 0}]
    table = pd.DataFrame(rows).set_index("step")
    series = {}
    for kind, choices in METRICS.items():
        points = (_points(table, choice) for choice in choices)
        if (some := next((one for one in points if len(one)), None)) is not None:
            series[kind] = some
    if "llh_chosen" not in series:
        raise ValueError(
            f"{directory} has no likelihoods of chosen completions: give runs of t5x_configs/runs/preference.gin, with at least one "
            "held-out evaluation."
        )
    alarms = _points(table, "indicators/alarm")
    return Run(name, series, min(alarms.index[alarms > 0], default=None), _outputs(directory))


def _outputs(directory: str | os.PathLike) -> int | None:
    """Returns the number of outputs at the last evaluation; None for a run without samples."""
    if not (files := samples.paths(directory)):
        return None
    with open(files[max(files)], "rb") as file:
        return sum(1 for _ in file)


def _points(table: pd.DataFrame, metric: str) -> pd.Series:
    """Returns the values of a metric by step, of which `*` is any task; several tasks are averaged."""
    pattern = re.compile(metric.replace("*", "[^/]+"))
    values = table[[name for name in table if pattern.fullmatch(name)]].astype(float).mean(axis=1)
    return values.dropna().groupby(level="step").last()


LEGEND = (
    "LLH is the mean log-likelihood per token of held-out chosen completions, entropy (bits) and mass are of the ten "
    "likeliest tokens where the policy writes, EAD is expectation-adjusted distinct n-grams, KL the mean log-ratio of "
    "policy and reference on what the policy wrote. An arrow goes from the first value to the last, @ names a step."
)
_NONE = "–"


# Heading -> which values of a series are shown, and their decimals.
_COLUMNS = {
    "best P_win": ("best", "p_win", 3),
    "last P_win": ("last", "p_win", 3),
    "best reward": ("best", "reward", 3),
    "last reward": ("last", "reward", 3),
    "LLH": ("change", "llh_chosen", 2),
    "gap": ("change", "llh_gap", 2),
    "highest entropy": ("best", "entropy", 2),
    "last entropy": ("last", "entropy", 2),
    "mass": ("change", "mass", 3),
    "EAD": ("change", "ead", 2),
    "KL": ("last", "kl", 1),
    "length": ("change", "length", 1),
    "accuracy": ("last", "accuracy", 2),
}
_EMPTY = pd.Series(dtype=float)


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Returns rows of cells, the header first, without columns that no run has."""
    columns = {
        "run": [run.name for run in runs],
        "steps": [f"{run.last:,}" for run in runs],
        "alarm": [_NONE if run.alarm is None else f"@ {run.alarm:,}" for run in runs],
        **{name: [_cell(run, *shown) for run in runs] for name, shown in _COLUMNS.items()},
    }
    shown = {
        name: cells for name, cells in columns.items() if name == "alarm" or set(cells) != {_NONE}
    }
    return [list(shown), *map(list, zip(*shown.values(), strict=True))]


def _cell(run: Run, which: str, name: str, digits: int) -> str:
    if name == "accuracy" and "accuracy_held_out" in run.series:
        name = "accuracy_held_out"
    if (points := run.series.get(name)) is None:
        return _NONE

    if which == "best":
        return f"{number(points.max(), digits)} @ {points.idxmax():,}"
    last = number(points.iloc[-1], digits)
    return last if which == "last" else f"{number(points.iloc[0], digits)} → {last}"


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
    elif few := _too_few(run):
        verdict = f"too few to judge ({few}), and no alarm"
    elif entropy < (1 - StoppingRule.entropy_drop) * peak[1] and last < first:
        verdict = f"an early warning, for entropy falls since step {peak[0]:,}, and no alarm"
    else:
        verdict = "no sign of over-optimisation"
    cut = "; every output was cut at the limit of tokens" if run.final("ended") == 0 else ""
    return f"{verdict}: {moved}, {spread}{judged}{cut}."


def _too_few(run: Run) -> str:
    """Returns why the readings say nothing about over-optimisation; an empty text if they are enough."""
    readings = len(run.series["entropy"])
    if readings <= StoppingRule.drops:
        return f"{readings} readings, where a sign needs {StoppingRule.drops + 1}"
    if run.outputs is not None and run.outputs < FEWEST_OUTPUTS:
        return f"readings of {run.outputs} outputs, where noise needs {FEWEST_OUTPUTS}"
    return ""


def _moved(first: float, last: float) -> str:
    """Returns the change, as far as two digits show it."""
    before, after = (f"{value:.2f}".replace("-0.00", "0.00") for value in (first, last))
    if before == after:
        return f"stayed at {after}"
    return f"{'fell' if last < first else 'rose'} from {before} to {after}"


def length_link(runs: Sequence[Run]) -> str | None:
    """Returns the correlation of likelihood with length of output over all evaluations; None for fewer than three."""
    columns = [[run.series.get(name, _EMPTY) for name in ("llh_chosen", "length")] for run in runs]
    points = pd.concat([pd.concat(pair, axis=1, join="inner") for pair in columns])
    r = points.corr().iloc[0, 1]
    if len(points) < 3 or pd.isna(r):
        return None
    return f"length: r = {r:.2f} between likelihood and length of output, over {len(points)} evaluations."
