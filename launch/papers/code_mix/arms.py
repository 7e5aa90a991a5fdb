"""The scores of the code-mix runs, and the names of arms and sources in the report."""

import functools
from collections.abc import Mapping
from typing import Any

import pandas as pd

from launch.evaluation.suites import scores as suite_scores
from launch.papers.code_mix.suite import SUITE
from launch.papers.shared import results

GROUPS = ("reasoning", "knowledge", "code")
PLACES = {"skills": "generated text", "packages": "installed packages"}
_MAIN = "width64"  # else the first size


class Results(results.Results):
    """Runs of a part, as `measure.run` returns them. A score is exact match of a group, or bits per byte of a task."""

    shows_differences = False

    @property
    def main(self) -> str | None:
        """The size at which arms are compared."""
        return _MAIN if _MAIN in self.sizes else next(iter(self.sizes), None)

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        bits = {task: values.get("bits_per_byte") for task, values in row["held_out"].items()}
        return {**bits, **_by_group(row["evaluations"])}

    def lower_is_better(self, score: str) -> bool:
        return score not in GROUPS

    def digits(self, score: str) -> int:
        return 3

    def label(self, arm: str) -> str:
        return arm_name(arm)

    def scores(self, arm: str, score: str, size: str | None = None) -> pd.Series:
        """Returns a score by seed.

        Raises:
          ValueError: a run lacks a benchmark of the group.
        """
        scores = super().scores(arm, score, size)
        rows = self.find(arm, size) if score in GROUPS else {}
        if lacking := set(rows) - set(scores.index):
            run = rows[min(lacking)]["run"]
            raise ValueError(f"run {run} has no score of {score}: some benchmark of it is missing.")
        return scores

    @functools.cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups of benchmarks that every run has a score of."""
        return tuple(group for group in GROUPS if self.rows and self.table[group].notna().all())

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:
        """The held-out tasks that every run has the bits per byte of."""
        tasks = self.rows[0]["held_out"] if self.rows else ()
        return tuple(task for task in tasks if self.table[task].notna().all())

    @functools.cached_property
    def sizes(self) -> tuple[str, ...]:
        """In the order of the sweep."""
        return tuple(dict.fromkeys(row["size"] for row in self.rows if row["size"] is not None))


def _by_group(evaluations: Mapping[str, Any]) -> Mapping[str, float | None]:
    """Returns exact match of skills, or means of the groups' benchmarks; None where some are missing."""
    if "skills" in evaluations:
        return {group: float(evaluations["skills"][group]["exact"]) for group in GROUPS}
    scores: dict[str, float] = {}
    for values in evaluations.values():
        scores |= {name: one["score"] for name, one in values.get("benchmarks", {}).items()}
        if "pass_at_k" in values:
            scores[values["problems"]] = values["pass_at_k"]["1"]
    return dict(suite_scores.means(SUITE, scores)[0])


def arm_name(name: str) -> str:
    """Returns the name of an arm in the report."""
    return name.replace("_to_", " → ").replace("_", " ")


def source_name(task: str) -> str:
    """Returns the name of a source in the report."""
    return task.removeprefix("skill_").replace("_", " ")
