"""Results of the sweeps by arm, group of skills and seed, paired where arms are compared."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.evaluation.suites import scores as suite_scores
from launch.papers.code_mix.suite import SUITE

GROUPS = ("reasoning", "knowledge", "code")
MAIN = "width64"  # of several sizes; else the first


@dataclasses.dataclass(frozen=True)
class Results:
    """Rows of a sweep.

    Attributes:
      rows: as `experiment.run` returns them for a part.
    """

    rows: Sequence[Mapping[str, Any]]

    @functools.cached_property
    def groups(self) -> tuple[str, ...]:
        """Those of GROUPS that every row has a score of."""
        return tuple(
            group
            for group in GROUPS
            if self.rows and all(_of_group(row, group) is not None for row in self.rows)
        )

    @functools.cached_property
    def sizes(self) -> tuple[str, ...]:
        """In the order of the sweep."""
        return tuple(dict.fromkeys(row["size"] for row in self.rows if row["size"] is not None))

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:
        """Held-out tasks of which every row has the bits per byte."""
        tasks = self.rows[0]["held_out"] if self.rows else ()
        return tuple(
            task
            for task in tasks
            if all(row["held_out"].get(task, {}).get("bits_per_byte") for row in self.rows)
        )

    @property
    def main(self) -> str | None:
        """The size that arms are compared at."""
        return MAIN if MAIN in self.sizes else next(iter(self.sizes), None)

    def find(self, arm: str, size: str | None = None) -> dict[int, Mapping[str, Any]]:
        """The rows of an arm by seed."""
        return {
            row["seed"]: row
            for row in self.rows
            if row["arm"] == arm and row["size"] in (None, size or self.main)
        }

    def has(self, *arms: str) -> bool:
        return all(self.find(arm) for arm in arms)

    def scores(self, arm: str, group: str, size: str | None = None) -> dict[int, float]:
        """By seed: exact match of a group, or bits per byte of a task."""
        return {seed: _score(row, group) for seed, row in self.find(arm, size).items()}

    def paired(self, group: str, *cases: str | tuple[str, str | None]) -> list[np.ndarray]:
        """Scores of arms, or of (arm, size), of the seeds that all of them have, in one order."""
        arms = [(case, None) if isinstance(case, str) else case for case in cases]
        found = [self.scores(arm, group, size) for arm, size in arms]
        seeds = sorted(set.intersection(*map(set, found)))
        return [np.array([scores[seed] for seed in seeds]) for scores in found]


def _score(row: Mapping[str, Any], group: str) -> float:
    if group not in GROUPS:
        return float(row["held_out"][group]["bits_per_byte"])
    score = _of_group(row, group)
    if score is None:
        raise ValueError(
            f"run {row['run']} has no score of {group}: some benchmark of it is missing."
        )
    return score


def _of_group(row: Mapping[str, Any], group: str) -> float | None:
    """Exact match of skills, or the mean of a group's benchmarks; None where some are missing."""
    evaluations = row["evaluations"]
    if "skills" in evaluations:
        return float(evaluations["skills"][group]["exact"])
    found: dict[str, float] = {}
    for values in evaluations.values():
        found |= {name: one["score"] for name, one in values.get("benchmarks", {}).items()}
        if "pass_at_k" in values:
            found[values["problems"]] = values["pass_at_k"]["1"]
    return suite_scores.means(SUITE, found)[0][group]
