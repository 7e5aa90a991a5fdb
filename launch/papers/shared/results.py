"""The results of a part of an experiment: one table of scores by arm, size and seed, and evidence from pairs of arms."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from launch.papers.shared.claim import Evidence
from launch.plots import intervals


@dataclasses.dataclass(frozen=True)
class Results:
    """Runs of a sweep. A paper's subclass says which scores a run has.

    Attributes:
      rows: one per run, with 'arm', 'seed' and, in sweeps over sizes, 'size'.
    """

    rows: Sequence[Mapping[str, Any]]
    main = None  # the size at which arms are compared, in sweeps over sizes

    def row_scores(self, row: Mapping[str, Any]) -> Mapping[str, float | None]:
        """Returns all scores of a run by name."""
        raise NotImplementedError

    def digits(self, score: str) -> int:
        """Returns the number of decimals that a score is shown with."""
        del score
        return 2

    def label(self, arm: str) -> str:
        """Returns the name of an arm in the report."""
        return arm.replace("_", " ")

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """The columns arm, size and seed, and one for each score; NaN where a run lacks a score."""
        keys = [{key: row.get(key) for key in ("arm", "size", "seed")} for row in self.rows]
        scores = [self.row_scores(row) for row in self.rows]
        frame = pd.DataFrame(keys, columns=["arm", "size", "seed"], dtype=object)
        return frame.join(pd.DataFrame(scores, dtype=float))

    def find(self, arm: str, size: str | None = None) -> dict[int, Mapping[str, Any]]:
        """Returns the rows of an arm by seed, at a size or else at the main one."""
        return {
            row["seed"]: row
            for row in self.rows
            if row["arm"] == arm and row.get("size") in (None, size or self.main)
        }

    def has(self, *arms: str) -> bool:
        return all(self.find(arm) for arm in arms)

    def scores(self, arm: str, score: str, size: str | None = None) -> pd.Series:
        """Returns a score of an arm by seed, of the runs that have it."""
        mine = self._by_arm.get(arm)
        if mine is None or score not in mine:
            return pd.Series(dtype=float)
        if self.main is not None:
            mine = mine[mine["size"].isna() | (mine["size"] == (size or self.main))]
        return mine[score].dropna()

    @functools.cached_property
    def _by_arm(self) -> dict[str, pd.DataFrame]:
        groups = self.table.groupby("arm", sort=False)
        return {str(arm): runs.set_index("seed") for arm, runs in groups}

    def values(self, arm: str, score: str, size: str | None = None) -> np.ndarray:
        """Returns a score of an arm, one value per seed."""
        return self.scores(arm, score, size).to_numpy()

    def paired(self, score: str, *cases: str | tuple[str, str | None]) -> list[np.ndarray]:
        """Returns a score of arms, or of (arm, size), at the seeds that all of them have, in one order."""
        arms = [(case, None) if isinstance(case, str) else case for case in cases]
        columns = [self.scores(arm, score, size) for arm, size in arms]
        joined = pd.concat(columns, axis=1, join="inner").sort_index()
        return list(joined.to_numpy().T)

    def mean(self, values: np.ndarray, score: str) -> str:
        """Returns the mean over seeds with its interval, as text."""
        return intervals.text(intervals.over_seeds(values), self.digits(score))

    def missing(self, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """Returns the names of arms without a run for some of the seeds, with these seeds."""
        return [
            text
            for arm in arms
            for text in named(f"`{arm}`", [s for s in seeds if s not in self.find(arm)], seeds)
        ]


def named(what: str, missing: Sequence[int], planned: Collection[int]) -> list[str]:
    """Returns `what` with the seeds it lacks, its name alone if it lacks all, and nothing if it lacks none."""
    if not missing:
        return []
    some = f" (seed {', '.join(map(str, missing))})" if len(missing) < len(planned) else ""
    return [what + some]


def amount(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the number of runs, their seeds and the minutes they took, as text."""
    seeds = sorted({row["seed"] for row in rows})
    minutes = sum(row["seconds"] for row in rows) / 60
    return f"{len(rows)} runs, seeds {', '.join(map(str, seeds))}; {minutes:.0f} minutes of runs"


def better(
    results: Results,
    where: str,
    score: str,
    one: str,
    other: str,
    *,
    lower: bool = False,
    no_worse: bool = False,
    difference: bool = True,
) -> list[Evidence]:
    """Returns whether an arm has the better score, by a sign test over seeds; nothing where one of them is missing.

    Args:
      results: of a sweep.
      where: name of the part in the report.
      score: column of the table.
      one, other: the arms.
      lower: whether lower scores are better.
      no_worse: whether it also holds if the other arm is not significantly better.
      difference: whether the mean difference is reported.
    """
    ones, others = results.paired(score, one, other)
    if not len(ones):
        return []
    gaps = others - ones if lower else ones - others
    gap = f" difference {results.mean(ones - others, score)}," if difference else ""
    words = (
        f"{score.replace('_', ' ')}: {results.label(one)} {results.mean(ones, score)}, "
        f"{results.label(other)} {results.mean(others, score)};{gap} {sign_test(gaps)}"
    )
    significant = intervals.significant
    return [Evidence(where, words, not significant(-gaps) if no_worse else significant(gaps))]


def sign_test(gaps: np.ndarray) -> str:
    """Returns the outcome of a sign test over pairs of runs, as text."""
    wins, p = int((gaps > 0).sum()), intervals.sign_test(gaps)
    return f"better in {wins} of {gaps.size} pairs (p = {p:.3g})"


def change(ones: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Returns the mean change of paired runs against others in percent, with its interval."""
    return intervals.over_seeds(100 * (ones - others) / others)
