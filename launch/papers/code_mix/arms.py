"""The scores of the code-mix runs, and the names of arms and sources in the report."""

import functools
from collections.abc import Mapping
from typing import Any

import pandas as pd

from data.code_mix.skills import RARE
from launch.evaluation.suites import scores as suite_scores
from launch.papers.code_mix.suite import SUITE
from launch.papers.shared import results

GROUPS = ("reasoning", "knowledge", "code")
PLAIN = "code without rare cases"
PLACES = {"skills": "generated text"}
_LEARNED = 0.02  # of exact match: a model without any skill above it has learned nothing


class Results(results.Results):
    """Runs of a part, as `measure.run` returns them.

    A score is exact match of a group, bits per byte of a task, or the wins over another arm in judged answers.
    """

    @property
    def main(self) -> str | None:
        """The size at which arms are compared: the first."""
        return next(iter(self.sizes), None)

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        bits = {task: values.get("bits_per_byte") for task, values in row["held_out"].items()}
        judged = row.get("judged", {})
        won = {wins(arm): one["win"] - one["loss"] for arm, one in judged.items()}
        itself = {wins(row["arm"]): 0.0} if judged else {}
        return {**bits, **won, **itself, **_by_group(row["evaluations"])}

    def lower_is_better(self, score: str) -> bool:
        return score in self.domains

    def limits(self, score: str) -> tuple[float, float] | None:
        return (0.0, 1.0) if score in GROUPS else None

    def degenerate(self, row: Mapping[str, Any]) -> str:
        scores = [value for value in _by_group(row["evaluations"]).values() if value is not None]
        return "it has learned no skill" if scores and max(scores) <= _LEARNED else ""

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
        scored = evaluations["skills"]
        plain = [exact for kind, exact in scored["code"]["by_kind"].items() if RARE not in kind]
        exact = {group: float(scored[group]["exact"]) for group in GROUPS}
        return {**exact, PLAIN: sum(plain) / len(plain)}
    scores: dict[str, float] = {}
    for values in (one for one in evaluations.values() if isinstance(one, Mapping)):
        scores |= {name: one["score"] for name, one in values.get("benchmarks", {}).items()}
        if "pass_at_k" in values:
            scores[values["problems"]] = values["pass_at_k"]["1"]
    return dict(suite_scores.means(SUITE, scores)[0])


def wins(arm: str) -> str:
    """Returns the score that is the share of judged prompts won against an arm, less the share lost."""
    return f"wins over {arm_name(arm)}"


def arm_name(name: str) -> str:
    """Returns the name of an arm in the report."""
    return name.replace("_to_", " → ").replace("_", " ")


def source_name(task: str) -> str:
    """Returns the name of a source in the report."""
    return task.removeprefix("skill_").replace("_", " ")
