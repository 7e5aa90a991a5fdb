"""Courses of the runs, evaluation by evaluation. Shape: E evaluations."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.preference.arms import ARMS, Arm

WINDOW = 3  # evaluations of a moving mean, such as that of a run's end


@dataclasses.dataclass(frozen=True)
class Course:
    """What one run's evaluations found.

    Attributes:
      arm: which.
      seed: of the run.
      values: name -> [E], the names of `experiment.with_course`.
    """

    arm: Arm
    seed: int
    values: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]

    def start(self, name: str) -> float:
        """Before the first update."""
        return float(self[name][0])

    def moving(self, name: str) -> np.ndarray:
        """Means of WINDOW evaluations around each; the first and the last have their neighbour's."""
        middle = np.convolve(self[name], np.full(WINDOW, 1 / WINDOW), mode="valid")
        return np.pad(middle, WINDOW // 2, mode="edge")

    def end(self, name: str) -> float:
        """Mean of the last WINDOW evaluations."""
        return float(self.moving(name)[-1])

    @property
    def best(self) -> int:
        """The evaluation of the best P_win, by the moving mean: the middle one of its window."""
        half = WINDOW // 2
        return half + int(np.argmax(self.moving("p_win")[half:-half]))


def courses(found: Mapping[str, Any]) -> list[Course]:
    """Of all runs that are there and have evaluations, in the order of the sweep's arms."""
    rows = [row for row in found.get("language", ()) if len(row["course"]) >= WINDOW]
    named = {(row["arm"], row["seed"]): row["course"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    return [
        Course(ARMS[arm], seed, _columns(named[arm, seed]))
        for arm in ARMS
        for seed in seeds
        if (arm, seed) in named
    ]


def _columns(course: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([one[name] for one in course], float) for name in course[0]}


def direct(every: Sequence[Course]) -> list[Course]:
    """The runs that learn from pairs."""
    return [one for one in every if one.arm.direct]


def by_seed(every: Sequence[Course]) -> dict[int, list[Course]]:
    return {
        seed: [one for one in every if one.seed == seed]
        for seed in sorted({one.seed for one in every})
    }


def find(every: Sequence[Course], arm: Arm) -> list[Course]:
    """The runs of an arm, by seed."""
    return [one for one in every if one.arm == arm]


def points(every: Sequence[Course], *names: str) -> list[np.ndarray]:
    """Values [E] of all evaluations that have all of them.

    Runs of one seed share their evaluation before the first update, which counts once.
    """
    known, parts = set(), []
    for one in every:
        first = int(one.seed in known)
        known.add(one.seed)
        parts.append(np.stack([one[name][first:] for name in names]))
    joined = np.concatenate(parts, axis=1) if parts else np.zeros((len(names), 0))
    return list(joined[:, np.isfinite(joined).all(0)])
