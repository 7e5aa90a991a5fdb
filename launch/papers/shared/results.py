"""The results of a part of an experiment: one table of scores by arm, size and seed, and evidence from pairs of arms."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from launch.papers.shared.claim import Evidence, Measure
from launch.plots import intervals


@dataclasses.dataclass(frozen=True)
class Results:
    """Runs of a sweep. A paper's subclass defines the scores of a run.

    Attributes:
      rows: one per run, with 'arm', 'seed' and, in sweeps over sizes, 'size'.
    """

    rows: Sequence[Mapping[str, Any]]
    main = None  # the size at which arms are compared, in sweeps over sizes
    shows_differences = True  # whether evidence from pairs of arms has their mean difference

    def row_scores(self, row: Mapping[str, Any]) -> Mapping[str, float | None]:
        """Returns all scores of a run by name."""
        raise NotImplementedError

    def lower_is_better(self, score: str) -> bool:
        del score
        return True

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

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(row["arm"] for row in self.rows))

    @property
    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.rows})

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
        return aligned(*(self.scores(arm, score, size) for arm, size in arms))

    def mean(self, values: np.ndarray, score: str) -> str:
        """Returns the mean over seeds with its interval, as text."""
        return intervals.text(intervals.over_seeds(values), self.digits(score))

    def amount(self) -> str:
        """Returns the number of runs, their seeds and the minutes they took, as text."""
        minutes = sum(row["seconds"] for row in self.rows) / 60
        return f"{len(self.rows)} runs, seeds {', '.join(map(str, self.seeds))}; {minutes:.0f} minutes of runs"

    def missing(self, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """Returns the names of arms without a run for some of the seeds, with these seeds."""
        return [
            text
            for arm in arms
            for text in named(f"`{arm}`", [s for s in seeds if s not in self.find(arm)], seeds)
        ]

    def better(
        self, where: str, score: str, one: str, other: str, *, no_worse: bool = False
    ) -> list[Evidence]:
        """Returns whether an arm has the better score, by a sign test over seeds; nothing where one of them is missing.

        With `no_worse` it also holds if the other arm is not significantly better.
        """
        ones, others = self.paired(score, one, other)
        if not len(ones):
            return []
        gaps = others - ones if self.lower_is_better(score) else ones - others
        gap = f" difference {self.mean(ones - others, score)}," if self.shows_differences else ""
        words = (
            f"{score.replace('_', ' ')}: {self.label(one)} {self.mean(ones, score)}, "
            f"{self.label(other)} {self.mean(others, score)};{gap} {sign_test(gaps)}"
        )
        significant = intervals.significant
        return [Evidence(where, words, not significant(-gaps) if no_worse else significant(gaps))]


def compare(score: str, *pairs: tuple[str, str], no_worse: bool = False) -> Measure:
    """Returns a measure of whether the first arm of each pair has the better score: see `Results.better`."""

    def measure(runs: Results, where: str) -> list[Evidence]:
        return [e for pair in pairs for e in runs.better(where, score, *pair, no_worse=no_worse)]

    return measure


def aligned(*scores: pd.Series) -> list[np.ndarray]:
    """Returns scores by seed at the seeds that all of them have, in one order."""
    return list(pd.concat(scores, axis=1, join="inner").sort_index().to_numpy().T)


def named(what: str, missing: Sequence[int], planned: Collection[int]) -> list[str]:
    """Returns `what` with the seeds it lacks, its name alone if it lacks all, and nothing if it lacks none."""
    if not missing:
        return []
    some = f" (seed {', '.join(map(str, missing))})" if len(missing) < len(planned) else ""
    return [what + some]


def sign_test(gaps: np.ndarray) -> str:
    """Returns the outcome of a sign test over pairs of runs, as text."""
    wins, p = int((gaps > 0).sum()), intervals.sign_test(gaps)
    return f"better in {wins} of {gaps.size} pairs (p = {p:.3g})"


def change(ones: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Returns the mean change of paired runs against others in percent, with its interval."""
    return intervals.over_seeds(100 * (ones - others) / others)
