"""Results of a sweep by arm and seed, and evidence of two arms, seed by seed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.shared.claim import Evidence
from launch.plots import intervals


@dataclasses.dataclass(frozen=True)
class Results:
    """Rows of a sweep; what scores they have, a subclass says.

    Attributes:
      rows: as the `experiment.run` of a reproduction returns them.
    """

    rows: Sequence[Mapping[str, Any]]

    def score(self, row: Mapping[str, Any], name: str) -> float | None:
        """A number of a run, None if it has none."""
        raise KeyError(name)

    def digits(self, name: str) -> int:
        """After the point, of a score as a reader sees it."""
        del name
        return 2

    def label(self, arm: str) -> str:
        """An arm as a reader sees it."""
        return arm.replace("_", " ")

    def find(self, arm: str) -> dict[int, Mapping[str, Any]]:
        """The rows of an arm by seed."""
        return {row["seed"]: row for row in self.rows if row["arm"] == arm}

    def has(self, *arms: str) -> bool:
        return all(self.find(arm) for arm in arms)

    def scores(self, arm: str, name: str) -> dict[int, float]:
        """By seed, of those runs that have it: see `score`."""
        found = {seed: self.score(row, name) for seed, row in self.find(arm).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def values(self, arm: str, name: str) -> np.ndarray:
        """The scores alone."""
        return np.array(list(self.scores(arm, name).values()))

    def paired(self, name: str, *arms: str) -> list[np.ndarray]:
        """Scores of arms, of the seeds that all of them have, in one order."""
        found = [self.scores(arm, name) for arm in arms]
        seeds = sorted(set.intersection(*map(set, found)))
        return [np.array([scores[seed] for seed in seeds]) for scores in found]

    def missing(self, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """The runs that are not there, as a reader is told: an arm, or some seeds of it."""
        out = []
        for arm in arms:
            left = [seed for seed in seeds if seed not in self.find(arm)]
            if left:
                some = f" (seed {', '.join(map(str, left))})" if len(left) < len(seeds) else ""
                out.append(f"`{arm}`{some}")
        return out

    def mean(self, values: np.ndarray, name: str) -> str:
        """Over seeds, with the interval."""
        return intervals.text(intervals.over_seeds(values), self.digits(name))


def better(
    results: Results,
    where: str,
    score: str,
    one: str,
    other: str,
    *,
    lower: bool = False,
    no_worse: bool = False,
) -> list[Evidence]:
    """Whether an arm has the better score than another; nothing where one of them is not there.

    Args:
      results: of a sweep.
      where: for the reader.
      score: of results.score.
      one, other: the arms.
      lower: whether lower scores are better.
      no_worse: whether it counts as well if the other is not significantly better.
    """
    ones, others = results.paired(score, one, other)
    if not len(ones):
        return []
    gaps = others - ones if lower else ones - others
    wins, p = int((gaps > 0).sum()), intervals.sign_test(gaps)
    words = (
        f"{score.replace('_', ' ')}: {results.label(one)} {results.mean(ones, score)}, "
        f"{results.label(other)} {results.mean(others, score)}; difference "
        f"{results.mean(ones - others, score)}, better in {wins} of {gaps.size} pairs (p = {p:.3g})"
    )
    significant = intervals.significant
    return [Evidence(where, words, not significant(-gaps) if no_worse else significant(gaps))]
