"""The runs of a report: directories, or the finished runs of sweeps."""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from espalier.launch.run import metric_rows
from espalier.launch.run.model_record import CONFIG
from espalier.launch.sweep.folder import read_results

# Held-out metric that only losses of one unit have -> that unit, for runs whose objective is unknown.
_UNITS = {
    "perplexity": "nats per token",
    "bits_per_byte": "nats per token",
    "images": "nats per image",
    "pairs": "per pair",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      arm: what it is compared as; runs of an arm differ in their seed.
      seed: its seed in the sweep; None for a run outside of a sweep.
      step: of its last evaluation.
      domains: the held-out metrics of that, by domain.
      rows: its metrics by step.
      objective: its objective.
      scores: numbers of a sweep's other evaluations, by name.
      config: its configuration as gin text; None for a run of a sweep, whose arms say it, or without one.
    """

    arm: str
    seed: int | None
    step: int
    domains: Mapping[str, Mapping[str, float]]
    rows: Sequence[Mapping[str, Any]]
    objective: metric_rows.Objective
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    config: str | None = None

    @property
    def name(self) -> str:
        return self.arm if self.seed is None else f"{self.arm}, seed {self.seed}"

    @property
    def kind(self) -> tuple[str, str]:
        """The objective's name and the unit of its loss, in which runs must agree to be compared."""
        metrics = {metric for values in self.domains.values() for metric in values}
        unit = next((unit for metric, unit in _UNITS.items() if metric in metrics), "")
        return self.objective.name, self.objective.unit or unit

    @functools.cached_property
    def series(self) -> dict[str, pd.Series]:
        """The values of each metric by step."""
        if not self.rows:
            return {}
        table = pd.DataFrame(self.rows).set_index("step").drop(columns="time", errors="ignore")
        every = {name: table[name].dropna().astype(float) for name in table}
        return {name: values.groupby(level="step").last() for name, values in every.items()}


def from_directories(directories: Mapping[str, str]) -> dict[str, Run]:
    """Returns runs by name.

    Raises:
      FileNotFoundError: a directory holds no metrics.
      ValueError: a file of metrics is damaged, or no run has been evaluated. A run that has not been evaluated yet, beside
        others, is named on standard error and left out.
    """
    runs: dict[str, Run] = {}
    refusals = []
    for name, directory in directories.items():
        rows = metric_rows.read_rows(directory)
        try:
            evaluation = metric_rows.last_evaluation(name, rows)
        except metric_rows.NotEvaluatedError as error:
            refusals.append(error)
            continue
        for domain, values in evaluation["domains"].items():
            if "loss" not in values:
                raise ValueError(
                    f"{directory}/metrics.jsonl, the row of step {evaluation['step']} has no eval/{domain}/loss to "
                    f"compare: remove the row, or evaluate {domain} again."
                )
        arm = name.replace("_", " ")
        config = pathlib.Path(directory, CONFIG)
        runs[name] = Run(
            arm,
            None,
            **evaluation,
            rows=rows,
            objective=metric_rows.objective_of(directory),
            config=config.read_text("utf-8", "replace") if config.is_file() else None,
        )
    if not runs:
        raise refusals[0]
    for refusal in refusals:
        print(f"Left out: {refusal}", file=sys.stderr)
    return runs


def from_sweeps(folders: Sequence[str]) -> list[Run]:
    """Returns the finished runs of sweeps, in their order.

    Raises:
      FileNotFoundError: a folder holds no sweep.
      ValueError: no run is finished, or a file of metrics is damaged.
    """
    runs = []
    for folder, name in zip(folders, metric_rows.named(folders), strict=True):
        results = read_results(folder)
        sized = len({row["size"] for row in results}) > 1
        for row in results:
            directory = pathlib.Path(folder, row["directory"])
            has_metrics = os.path.exists(directory / "metrics.jsonl")
            arm = row["arm"].replace("_", " ") + (f", {row['size']}" if sized else "")
            runs.append(
                Run(
                    arm=f"{name}: {arm}" if len(folders) > 1 else arm,
                    seed=row["seed"],
                    step=row["step"],
                    domains=row["held_out"],
                    rows=metric_rows.read_rows(directory) if has_metrics else (),
                    objective=metric_rows.objective_of(directory),
                    scores=dict(metric_rows.numbers(row.get("evaluations", {}))),
                )
            )
    if not runs:
        raise ValueError(
            f"no run of {', '.join(folders)} is finished yet: see espalier sweep --out DIR --status."
        )
    return runs
