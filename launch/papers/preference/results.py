"""The arms of the sweep and the courses of their runs. Shape: E evaluations."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.preference import smollm_sweep, sweep

WINDOW = 3  # evaluations of a moving mean, such as that of a run's end
# Method that learns from pairs -> (its name, the letter of its strength).
METHODS = {"dpo": ("DPO", "β"), "ipo": ("IPO", "τ"), "hinge": ("Hinge", "α")}
# Methods of one strength, which judge no claim.
OTHERS = {"simpo": "SimPO", "sft_better": "likelihood of better completions (SFT)"}
ONLINE = {"online_dpo": "online DPO", "rloo": "RLOO", "grpo": "GRPO", "ppo": "PPO"}
_STRENGTHS = {"dpo": sweep.DPO, "ipo": sweep.IPO, "hinge": sweep.HINGE}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method of METHODS with its strength (the hinge's is the weight of its regulariser) and NLL weight, or another."""

    method: str
    strength: float | None = None
    nll: float = 0.0

    @property
    def direct(self) -> bool:
        """Whether it is of the paper's methods."""
        return self.method in METHODS

    @property
    def name(self) -> str:
        """Its name in the sweep."""
        if self.strength is None:
            return self.method
        return sweep.arm(self.method, self.strength, self.nll)

    @property
    def setting(self) -> str:
        """Its strength and weight in the report."""
        if self.strength is None:
            return ""
        beside = f", λ = {self.nll:g}" if self.nll else ""
        return f"{METHODS[self.method][1]} = {self.strength:g}{beside}"

    @property
    def label(self) -> str:
        """Its name in the report."""
        if self.direct:
            return f"{METHODS[self.method][0]} {self.setting}"
        return (OTHERS | ONLINE)[self.method]


def arms_of(method: str) -> list[Arm]:
    """Returns all arms of a method of METHODS, from the one that moves furthest."""
    return [
        Arm(method, strength, weight)
        for strength, weights in _STRENGTHS[method].items()
        for weight in weights
    ]


DIRECT = {arm.name: arm for method in METHODS for arm in arms_of(method)}
ARMS = DIRECT | {method: Arm(method) for method in (*OTHERS, *sweep.ONLINE)}
SMOLLM = {name: Arm("dpo", beta, nll) for name, (beta, nll) in smollm_sweep.ARMS.items()}


@dataclasses.dataclass(frozen=True)
class Course:
    """The evaluations of one run.

    Attributes:
      arm, seed: of the run.
      every: name -> values of all evaluations, with the names of `measure.with_course`.
    """

    arm: Arm
    seed: int
    every: Mapping[str, np.ndarray]

    @functools.cached_property
    def _grid(self) -> np.ndarray:
        """Which evaluations have the distance of the last two: a run may have more of them at its beginning."""
        steps = self.every["step"]
        return steps % (steps[-1] - steps[-2]) == 0

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns values [E] of the evaluations that are evenly spaced."""
        return self.every[name][self._grid]

    def start(self, name: str) -> float:
        """Returns the value before the first update."""
        return float(self[name][0])

    def moving(self, name: str) -> np.ndarray:
        """Returns means of WINDOW evaluations around each; the first and the last have their neighbour's."""
        middle = np.convolve(self[name], np.full(WINDOW, 1 / WINDOW), mode="valid")
        return np.pad(middle, WINDOW // 2, mode="edge")

    def end(self, name: str) -> float:
        """Returns the mean of the last WINDOW evaluations."""
        return float(self.moving(name)[-1])

    def early(self, name: str, first: int, last: int) -> np.ndarray:
        """Returns the values of all evaluations after `first` to `last` updates."""
        steps = self.every["step"]
        return self.every[name][(steps >= first) & (steps <= last)]

    @property
    def best(self) -> int:
        """The evaluation of the best P_win by the moving mean, the middle one of its window."""
        half = WINDOW // 2
        return half + int(np.argmax(self.moving("p_win")[half:-half]))


def courses(rows: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm] = ARMS) -> list[Course]:
    """Returns the courses of all runs with enough evaluations, in the order of the arms."""
    order = list(arms)
    evaluated = [
        row for row in rows if row["arm"] in arms and len(row["course"].get("step", ())) >= WINDOW
    ]
    return [
        Course(arms[row["arm"]], row["seed"], _numbers(row["course"]))
        for row in sorted(evaluated, key=lambda row: (order.index(row["arm"]), row["seed"]))
    ]


def _numbers(course: Mapping[str, Sequence[float | None]]) -> dict[str, np.ndarray]:
    return {name: np.array(values, float) for name, values in course.items()}


def direct(courses: Sequence[Course]) -> list[Course]:
    """Returns the runs of the paper's methods."""
    return [one for one in courses if one.arm.direct]


def of_method(courses: Sequence[Course], method: str) -> list[Course]:
    return [one for one in courses if one.arm.method == method]


def by_seed(courses: Sequence[Course]) -> dict[int, list[Course]]:
    return {
        seed: [one for one in courses if one.seed == seed]
        for seed in sorted({one.seed for one in courses})
    }


def find(courses: Sequence[Course], arm: Arm) -> list[Course]:
    """Returns the runs of an arm, by seed."""
    return [one for one in courses if one.arm == arm]


def points(courses: Sequence[Course], *names: str) -> list[np.ndarray]:
    """Returns the values [E] of all evaluations that have all of them; 'fall' is how far the better LLH is below its start.

    Runs of one seed share their evaluation before the first update, which counts once.
    """
    known, parts = set(), []
    for one in courses:
        first = int(one.seed in known)
        known.add(one.seed)
        values = [
            one.start("llh_chosen") - one["llh_chosen"] if name == "fall" else one[name]
            for name in names
        ]
        parts.append(np.stack(values)[:, first:])
    joined = np.concatenate(parts, axis=1) if parts else np.zeros((len(names), 0))
    return list(joined[:, np.isfinite(joined).all(0)])
