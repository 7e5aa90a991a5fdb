"""The evaluations of runs, and the numbers of the runs of one seed, of which claims make effects. Shape: E evaluations.

P_win is fitted on likelihood by a line and a parabola, and averaged in bins. Likelihoods are read as falls, in nats per token below
the value before the first update: another model starts elsewhere. A number is None where runs are missing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from espalier.launch.papers.preference import experiment
from espalier.launch.papers.shared.results import Results

WINDOW = 3  # evaluations of a moving mean, such as that of a run's end
# Method that learns from pairs -> (its name, the letter of its strength).
METHODS = {"dpo": ("DPO", "β"), "ipo": ("IPO", "τ"), "hinge": ("Hinge", "α")}
# Methods of one strength, which judge no claim.
OTHERS = {"simpo": "SimPO", "sft_better": "likelihood of better completions (SFT)"}
ONLINE = {"online_dpo": "online DPO", "rloo": "RLOO", "grpo": "GRPO", "ppo": "PPO"}
_STRENGTHS = {"dpo": experiment.DPO, "ipo": experiment.IPO, "hinge": experiment.HINGE}


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
        return experiment.arm(self.method, self.strength, self.nll)

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
LARGE = tuple(experiment.arm("dpo", strength) for strength in experiment.LARGE_DPO)
ARMS = DIRECT | {method: Arm(method) for method in (*OTHERS, *experiment.ONLINE)}


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

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns the values [E] of all evaluations."""
        return self.every[name]

    @property
    def fall(self) -> np.ndarray:
        """How far [E] the better LLH is below its start."""
        return self.start("llh_chosen") - self["llh_chosen"]

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


class Runs(Results):
    """The runs of a sweep, each with its evaluations."""

    @functools.cached_property
    def _courses(self) -> dict[tuple[str, int], dict[str, np.ndarray]]:
        """(arm, seed) -> the values of a run with enough evaluations."""
        return {
            (row["arm"], row["seed"]): _numbers(row["course"])
            for row in self.rows
            if len(row["course"].get("step", ())) >= WINDOW
        }

    def courses(self, arms: Iterable[Arm] = tuple(ARMS.values())) -> list[Course]:
        """Returns the courses of the arms' runs with enough evaluations, in the order of the arms."""
        return [
            Course(arm, seed, self._courses[arm.name, seed])
            for arm in arms
            for seed in sorted(self.find(arm.name))
            if (arm.name, seed) in self._courses
        ]

    def complete(self, arms: Iterable[Arm]) -> dict[int, list[Course]]:
        """Returns seed -> the courses of these arms, of those that any seed has, for the seeds that have all of them."""
        courses = self.courses(arms)
        count = len({one.arm for one in courses})
        return {seed: mine for seed, mine in by_seed(courses).items() if len(mine) == count}


def _numbers(course: Mapping[str, Sequence[float | None]]) -> dict[str, np.ndarray]:
    """Returns the values of a course; NaN for those that a run of an earlier round lacks."""
    lacking = np.full(len(course["step"]), np.nan)
    found = {name: np.array(values, float) for name, values in course.items()}
    return {name: lacking for name in experiment.INDICATORS} | found


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
        values = [one.fall if name == "fall" else one[name] for name in names]
        parts.append(np.stack(values)[:, first:])
    joined = np.concatenate(parts, axis=1) if parts else np.zeros((len(names), 0))
    return list(joined[:, np.isfinite(joined).all(0)])


# Edges of the bins of falls, and the bins between which one in the middle is best: the two in the middle, as one.
EDGES = (0.08, 0.23, 0.63, 1.43, 3.43)
NEAR = (-np.inf, 0.08)
FIRST = (0.08, 0.63)  # away from the start, and up to where P_win was best with pilot seed 0
MIDDLE = (0.23, 1.43)
MOVED = (0.08, 1.43)  # away from the start, and not yet far
CLIP = 1.43  # the fall at which texts begin to break down
FAR = (CLIP, np.inf)
_BIN = 0.1  # nats, of bins in which likelihoods count as the same
LEAST_GAIN = 0.02  # of P_win over the start, in the middle: with less, no share of it can be told


@dataclasses.dataclass(frozen=True)
class Fit:
    """Least squares of degree 1 and 2.

    Attributes:
      line, parabola: coefficients, the highest power first.
      rmse_line, rmse_parabola: root mean squares of their residuals.
    """

    line: np.ndarray
    parabola: np.ndarray
    rmse_line: float
    rmse_parabola: float

    @property
    def curvature(self) -> float:
        return float(self.parabola[0])

    @property
    def reduction(self) -> float:
        """The share of the line's RMSE that the parabola saves."""
        return 1 - self.rmse_parabola / self.rmse_line


def fitted(x_E: np.ndarray, y_E: np.ndarray) -> Fit | None:
    """Returns the fit; None for fewer than four different places, which a parabola nearly interpolates."""
    if len(np.unique(x_E)) < 4:
        return None
    curves = [np.polyfit(x_E, y_E, degree) for degree in (1, 2)]
    errors = [float(np.sqrt(np.mean((y_E - np.polyval(one, x_E)) ** 2))) for one in curves]
    return Fit(*curves, *errors)


def near(fall_E: np.ndarray, y_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the evaluations whose likelihood has fallen by less than CLIP."""
    return fall_E[fall_E < CLIP], y_E[fall_E < CLIP]


def between(fall_E: np.ndarray, y_E: np.ndarray, low: float, high: float) -> float | None:
    """Returns the mean of y where the fall lies in [low, high); None where there are fewer than three."""
    inside_E = (fall_E >= low) & (fall_E < high)
    return float(y_E[inside_E].mean()) if inside_E.sum() >= 3 else None


def binned(fall_E: np.ndarray, y_E: np.ndarray) -> list[float | None]:
    """Returns the mean of y in each bin, from the smallest fall, that is the highest likelihood."""
    edges = (-np.inf, *EDGES, np.inf)
    return [between(fall_E, y_E, *bounds) for bounds in zip(edges, edges[1:], strict=False)]


Number = Callable[[Sequence[Course]], float | None]


def gain(courses: Sequence[Course]) -> float | None:
    """Returns the mean P_win at middle falls of likelihood minus that before the first update."""
    middle = between(*points(courses, "fall", "p_win"), *MIDDLE)
    return None if middle is None else middle - courses[0].start("p_win")


def lost(low: float, high: float, courses: Sequence[Course]) -> float | None:
    """Returns the share of the gain at middle falls that evaluations at falls in [low, high) lack; None without a gain."""
    both = points(courses, "fall", "p_win")
    middle, other, gained = between(*both, *MIDDLE), between(*both, low, high), gain(courses)
    if middle is None or other is None or gained is None or gained < LEAST_GAIN:
        return None
    return (middle - other) / gained


def fit_near(courses: Sequence[Course]) -> Fit | None:
    """Returns the fit of P_win on falls of likelihood below the clip."""
    return fitted(*near(*points(courses, "fall", "p_win")))


def saved(courses: Sequence[Course]) -> float | None:
    """Returns by how many per cent the RMSE of a parabola is below a line's; negative where it opens upwards."""
    if (fit := fit_near(courses)) is None:
        return None
    return -100 * float(np.sign(fit.curvature)) * fit.reduction


def curvature(courses: Sequence[Course]) -> float | None:
    """Returns the quadratic term of the fit."""
    return None if (fit := fit_near(courses)) is None else fit.curvature


def others_less_largest_gap(courses: Sequence[Course]) -> float | None:
    """Returns the mean P_win at the end of all runs but that of the largest gap, minus that one's."""
    if len(courses) < 3:
        return None
    gaps, wins = (np.array([one.end(name) for one in courses]) for name in ("llh_gap", "p_win"))
    at = int(np.argmax(gaps))
    return float(np.delete(wins, at).mean() - wins[at])


def others_less_large_gaps(quantile: float, courses: Sequence[Course]) -> float | None:
    """Returns the mean P_win of evaluations whose gap is below a quantile, minus that of the others."""
    gap_E, p_win_E = points(courses, "llh_gap", "p_win")
    if not gap_E.size:
        return None
    large_E = gap_E >= np.quantile(gap_E, quantile)
    return float(p_win_E[~large_E].mean() - p_win_E[large_E].mean())


def others_less_front(courses: Sequence[Course]) -> float | None:
    """Returns the mean P_win of evaluations that others surpass in better and in worse LLH, minus that of all others."""
    p_win_E, chosen_E, rejected_E = points(courses, "p_win", "llh_chosen", "llh_rejected")
    higher_EE = chosen_E > chosen_E[:, None]
    lower_EE = rejected_E < rejected_E[:, None]
    surpassed_E = (higher_EE & lower_EE).any(1)
    if surpassed_E.all() or not surpassed_E.any():
        return None
    return float(p_win_E[surpassed_E].mean() - p_win_E[~surpassed_E].mean())


def spearman(
    score: str, method: str, within: float, beside: str, courses: Sequence[Course]
) -> float | None:
    """Returns Spearman's correlation of a score and better LLH in a method's runs without an NLL term.

    Args:
      within: the fall of likelihood below which evaluations count.
      beside: another score that is held fixed (the partial correlation of ranks); empty for none.
    """
    from scipy import stats

    mine = [one for one in of_method(courses, method) if not one.arm.nll]
    names = ["fall", "llh_chosen", score, *([beside] if beside else [])]
    fall_E, *columns = points(mine, *names)
    ranks = [stats.rankdata(values[fall_E < within]) for values in columns]
    if any(len(np.unique(values)) < 3 for values in ranks):
        return None
    r = np.corrcoef(ranks)
    if not beside:
        return float(r[0, 1])
    if max(abs(r[0, 2]), abs(r[1, 2])) > 1 - 1e-9:
        return None  # nothing is left over
    return float((r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)))


def mean_spearman(
    score: str, methods: Sequence[str], within: float, beside: str, courses: Sequence[Course]
) -> float | None:
    """Returns the mean of `spearman` over methods; None where one of them has none."""
    found = [spearman(score, method, within, beside, courses) for method in methods]
    return None if None in found else float(np.mean([r for r in found if r is not None]))


def rise(name: str, courses: Sequence[Course]) -> float | None:
    """Returns the mean of a value where runs have moved and not yet far, minus that at the start, as a mean of runs."""
    moved = [between(one.fall, one[name], *MOVED) for one in courses]
    rises = [x - one.start(name) for x, one in zip(moved, courses, strict=True) if x is not None]
    return float(np.mean(rises)) if rises and len(rises) == len(courses) else None


def first_rise(name: str, methods: Sequence[str], courses: Sequence[Course]) -> float | None:
    """Returns the mean of a value over evaluations in FIRST of a method's runs without an NLL term minus that at the start.

    It is a mean over methods, None where one of them has too few evaluations there.
    """
    found = []
    for method in methods:
        mine = [one for one in of_method(courses, method) if not one.arm.nll]
        mean = between(*points(mine, "fall", name), *FIRST)
        if mean is None:
            return None
        found.append(mean - mine[0].start(name))
    return float(np.mean(found))


def turn(name: str, courses: Sequence[Course]) -> float | None:
    """Returns a value at the end minus its mean where runs had moved and not yet far, as a mean of runs."""
    early = rise(name, courses)
    if early is None:
        return None
    return float(np.mean([one.end(name) - one.start(name) for one in courses])) - early


def difference(name: str, one: Arm, other: Arm, courses: Sequence[Course]) -> float | None:
    """Returns the value of an arm at the end minus that of another."""
    ends = [[run.end(name) for run in find(courses, arm)] for arm in (one, other)]
    return ends[0][0] - ends[1][0] if all(ends) else None


def beside_nll(courses: Sequence[Course]) -> float | None:
    """Returns the P_win of runs with an NLL term minus that of runs without one at the same likelihood.

    Evaluations after updates are compared in bins of falls within the clip, which count by their evaluations with a term; bins with fewer than
    three evaluations of either kind are left out.
    """
    ours, others = (
        points([one for one in courses if bool(one.arm.nll) == term], "step", "fall", "p_win")
        for term in (True, False)
    )
    ours, others = ([x[one[0] > 0] for x in one[1:]] for one in (ours, others))
    edges = np.arange(0, CLIP + _BIN, _BIN)
    differences, counts = [], []
    for bounds in zip(edges, edges[1:], strict=False):
        mine, other = between(*ours, *bounds), between(*others, *bounds)
        if mine is not None and other is not None:
            differences.append(mine - other)
            counts.append(int(((ours[0] >= bounds[0]) & (ours[0] < bounds[1])).sum()))
    return float(np.average(differences, weights=counts)) if counts else None


def length_link(courses: Sequence[Course]) -> float | None:
    """Returns Pearson's correlation of better LLH and the length of outputs within the clip."""
    fall_E, *columns = points(courses, "fall", "llh_chosen", "length")
    both = [values[fall_E < CLIP] for values in columns]
    if any(len(np.unique(values)) < 2 for values in both):
        return None
    return float(np.corrcoef(both)[0, 1])
