"""The arms of the sweep, the courses of their runs, and conditions on them. Shape: E evaluations."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.preference import sweep
from launch.papers.shared.claim import Evidence
from launch.plots import intervals

WINDOW = 3  # evaluations of a moving mean, such as that of a run's end
# Method that learns from pairs -> (its name, the letter of its strength).
METHODS = {"dpo": ("DPO", "β"), "ipo": ("IPO", "τ"), "hinge": ("Hinge", "α")}
ONLINE = {"online_dpo": "online DPO", "rloo": "RLOO", "grpo": "GRPO", "ppo": "PPO"}
_STRENGTHS = {"dpo": sweep.DPO, "ipo": sweep.IPO, "hinge": sweep.HINGE}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method of METHODS with its strength (the hinge's is the weight of its regulariser) and NLL weight, or of ONLINE."""

    method: str
    strength: float | None = None
    nll: float = 0.0

    @property
    def direct(self) -> bool:
        """Whether it learns from pairs, which the paper is about."""
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
        return f"{METHODS[self.method][0]} {self.setting}" if self.direct else ONLINE[self.method]


def arms_of(method: str) -> list[Arm]:
    """Returns all arms of a method of METHODS, from the one that moves furthest."""
    return [
        Arm(method, strength, weight)
        for strength, weights in _STRENGTHS[method].items()
        for weight in weights
    ]


DIRECT = {arm.name: arm for method in METHODS for arm in arms_of(method)}
ARMS = DIRECT | {method: Arm(method) for method in sweep.ONLINE}


@dataclasses.dataclass(frozen=True)
class Course:
    """The evaluations of one run.

    Attributes:
      arm, seed: of the run.
      values: name -> [E], with the names of `measure.with_course`.
    """

    arm: Arm
    seed: int
    values: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]

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

    @property
    def best(self) -> int:
        """The evaluation of the best P_win by the moving mean, the middle one of its window."""
        half = WINDOW // 2
        return half + int(np.argmax(self.moving("p_win")[half:-half]))


def courses(rows: Sequence[Mapping[str, Any]]) -> list[Course]:
    """Returns the courses of all runs with enough evaluations, in the order of the sweep's arms."""
    order = list(ARMS)
    evaluated = [row for row in rows if row["arm"] in ARMS and len(row["course"]) >= WINDOW]
    return [
        Course(ARMS[row["arm"]], row["seed"], _columns(row["course"]))
        for row in sorted(evaluated, key=lambda row: (order.index(row["arm"]), row["seed"]))
    ]


def _columns(course: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([one[name] for one in course], float) for name in course[0]}


def direct(courses: Sequence[Course]) -> list[Course]:
    """Returns the runs that learn from pairs."""
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
    """Returns the values [E] of all evaluations that have all of them.

    Runs of one seed share their evaluation before the first update, which counts once.
    """
    known, parts = set(), []
    for one in courses:
        first = int(one.seed in known)
        known.add(one.seed)
        parts.append(np.stack([one[name][first:] for name in names]))
    joined = np.concatenate(parts, axis=1) if parts else np.zeros((len(names), 0))
    return list(joined[:, np.isfinite(joined).all(0)])


Numbers = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Condition:
    """A measure of a claim: a condition on numbers of the runs, judged in each seed and on the means over seeds.

    Attributes:
      of: the name of its runs in the report; empty for all of them.
      words: with the numbers' names in braces and their digits, as in "drop {drop:.1} %".
      numbers: of the runs of one seed; None where they are missing.
      holds: whether numbers meet the condition.
    """

    of: str
    words: str
    numbers: Callable[[Sequence[Course]], Numbers | None]
    holds: Callable[[Numbers], bool]

    @classmethod
    def on(
        cls, arm: Arm, words: str, numbers: Callable[[Course], Numbers], holds: Callable
    ) -> "Condition":
        """Returns a condition on the run of one arm."""

        def of_arm(courses: Sequence[Course]) -> Numbers | None:
            return next((numbers(one) for one in find(courses, arm)), None)

        return cls(arm.label, words, of_arm, holds)

    def __call__(self, courses: Sequence[Course], where: str) -> list[Evidence]:
        numbers = {seed: self.numbers(mine) for seed, mine in by_seed(courses).items()}
        there = {seed: one for seed, one in numbers.items() if one is not None}
        out = [self._judge(f"{where} {seed}", [one]) for seed, one in there.items()]
        if len(there) > 1:
            out.append(self._judge(f"{where}s {', '.join(map(str, there))}", list(there.values())))
        return out

    def _judge(self, where: str, seeds: Sequence[Numbers]) -> Evidence:
        values = {name: [one[name] for one in seeds] for name in seeds[0]}
        words = self.words.format(**{name: _Shown(of) for name, of in values.items()})
        means = {name: float(np.mean(of)) for name, of in values.items()}
        return Evidence(f"{where}, {self.of}" if self.of else where, words, self.holds(means))


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A number of one seed, or the mean of several with its interval; formats are '.digits', and 'n' without interval."""

    values: Sequence[float]

    def __format__(self, spec: str) -> str:
        if spec == "n":  # counts and steps
            return f"{np.mean(self.values):.0f}"
        digits = int(spec.removeprefix("."))
        if len(self.values) == 1:
            return f"{self.values[0]:.{digits}f}"
        return intervals.text(intervals.over_seeds(self.values), digits)
