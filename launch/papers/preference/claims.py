"""The claims on likelihood and quality and how each is measured. Shape: E evaluations.

Only methods that learn from pairs are judged. The stopping rule is in rule.py.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from launch.papers.preference import fits, results, rule
from launch.papers.preference.results import (
    METHODS,
    Arm,
    Condition,
    Course,
    Numbers,
    arms_of,
    find,
    points,
)
from launch.papers.shared.claim import Claim, RequiredClaim

APART = 0.05  # of P_win, by which the middle beats both ends
REDUCTION = 15.0  # per cent of RMSE
SPEARMAN = 0.5
PEARSON = 0.2
SMALL = (0.01, 0.1)  # strengths of DPO whose entropy is to turn
WEAK, STRONG = 0.1, 5.0  # of DPO beside an NLL term
WEIGHTS = (0.0, 0.1, 1.0)  # of the NLL term; at the strong one the last against the first
LLH_MOVES, P_WIN_MOVES = 0.02, 0.05  # at most, by an NLL term beside the strong one


def bins(courses: Sequence[Course], select: fits.Select) -> Numbers | None:
    """Returns the mean P_win in the end bins of better LLH, and in the best bin between them."""
    x_E, y_E = select(*points(courses, "llh_chosen", "p_win"))
    if len(x_E) < 2 * fits.BINS:
        return None
    _, means = fits.binned(x_E, y_E)
    return {"low": means[0], "middle": max(means[1:-1]), "high": means[-1]}


def parabola(courses: Sequence[Course]) -> Numbers | None:
    """Returns how much better a parabola fits P_win than a line."""
    both = points(courses, "llh_chosen", "p_win")
    near, whole = fits.fit(*fits.above(*both)), fits.fit(*both)
    if near is None or whole is None:
        return None
    return {
        "curvature": near.curvature,
        "line": near.rmse_line,
        "parabola": near.rmse_parabola,
        "reduction": near.reduction,
        "with_tail": whole.reduction,
    }


def largest_gap(courses: Sequence[Course]) -> Numbers | None:
    """Returns the P_win of the run with the largest gap at the end, and the best run's."""
    if len(courses) < 2:
        return None
    gaps, wins = (np.array([one.end(name) for one in courses]) for name in ("llh_gap", "p_win"))
    at = int(np.argmax(gaps))
    is_best = float(at == np.argmax(wins))
    return {"gap": gaps[at], "p_win": wins[at], "best": wins.max(), "is_best": is_best}


def front(courses: Sequence[Course]) -> Numbers | None:
    """Returns whether the evaluation of the best P_win is on the Pareto front of high better and low worse LLH."""
    p_win, chosen, rejected = points(courses, "p_win", "llh_chosen", "llh_rejected")
    if not p_win.size:
        return None
    at = int(np.argmax(p_win))
    dominating = int(((chosen > chosen[at]) & (rejected < rejected[at])).sum())
    numbers = {"p_win": p_win[at], "chosen": chosen[at], "rejected": rejected[at]}
    return {**numbers, "dominating": dominating, "on_front": float(not dominating)}


def ranks(score: str, name: str, holds: Callable[[Numbers], bool]) -> list[Condition]:
    """Returns conditions on Spearman's correlation with better LLH over all evaluations of each method."""
    words = f"Spearman's correlation of {name} and better LLH {{rho:.2}}, {{count:n}} evaluations"

    def numbers(courses: Sequence[Course], method: str) -> Numbers | None:
        from scipy import stats

        x_E, y_E = points(results.of_method(courses, method), "llh_chosen", score)
        if min(len(np.unique(x_E)), len(np.unique(y_E))) < 2:
            return None
        return {"rho": float(stats.spearmanr(x_E, y_E).statistic), "count": len(x_E)}

    return [
        Condition(label, words, functools.partial(numbers, method=method), holds)
        for method, (label, _) in METHODS.items()
    ]


def turn(one: Course) -> Numbers:
    """Returns where the entropy of a run peaks."""
    at = int(np.argmax(one["entropy"]))
    return {
        "start": one.start("entropy"),
        "peak": one["entropy"][at],
        "at": one["step"][at],
        "end": one.end("entropy"),
        "best": one["step"][one.best],
    }


def masses(one: Course) -> Numbers:
    """Returns the mass of the likeliest tokens at the start, at its lowest and at the end."""
    at = int(np.argmin(one["mass"]))
    return {
        "start": one.start("mass"),
        "lowest": one["mass"][at],
        "at": one["step"][at],
        "end": one.end("mass"),
        "entropy_start": one.start("entropy"),
        "entropy": one.end("entropy"),
    }


def _ends(courses: Sequence[Course], strength: float, weights: Sequence[float]) -> list[Course]:
    """Returns the runs of DPO with NLL terms of these weights; fewer where some are missing."""
    return [one for weight in weights for one in find(courses, Arm("dpo", strength, weight))[:1]]


def nll_difference(courses: Sequence[Course]) -> Numbers | None:
    """Returns the changes at the end by an NLL term beside strong DPO."""
    runs = _ends(courses, STRONG, (WEIGHTS[0], WEIGHTS[-1]))
    if len(runs) < 2:
        return None
    without, beside = runs
    names = {"llh": "llh_chosen", "p_win": "p_win"}
    return {key: beside.end(name) - without.end(name) for key, name in names.items()}


def nll_by_weight(courses: Sequence[Course]) -> Numbers | None:
    """Returns P_win and better LLH at the end of weak DPO by the weight of the NLL term."""
    runs = _ends(courses, WEAK, WEIGHTS)
    if len(runs) < len(WEIGHTS):
        return None
    names = {"p": "p_win", "llh": "llh_chosen"}
    return {f"{key}{i}": one.end(name) for i, one in enumerate(runs) for key, name in names.items()}


def length_link(courses: Sequence[Course]) -> Numbers | None:
    """Returns Pearson's correlation of better LLH and the length of outputs."""
    from trainers.preference.indicators import measures

    both = points(courses, "llh_chosen", "length")
    r, above = (measures.pearson(*some) for some in (both, fits.above(*both)))
    return None if np.isnan([r, above]).any() else {"r": r, "above": above}


_INTERMEDIATE = [
    *(
        Condition(
            of,
            "P_win {low:.3} in the lowest bin of better LLH, {middle:.3} in the best between, {high:.3} in the highest",
            functools.partial(bins, select=select),
            lambda n: n["middle"] - max(n["low"], n["high"]) > APART,
        )
        for of, select in (
            ("all evaluations", lambda *points: points),
            (f"above {fits.CLIP:g}", fits.above),
        )
    ),
    Condition(
        f"above {fits.CLIP:g}",
        "quadratic term {curvature:.3}, RMSE {line:.3} of a line and {parabola:.3} of a parabola, {reduction:.1} % "
        "less (with the tail {with_tail:.1} %)",
        parabola,
        lambda n: n["curvature"] < 0 and n["reduction"] > REDUCTION,
    ),
]
_GAP = [
    Condition(
        "",
        "at the end the run of the largest gap ({gap:.2}) has P_win {p_win:.3}, the best run {best:.3}",
        largest_gap,
        lambda n: n["is_best"] == 0,
    ),
    Condition(
        "",
        "the evaluation of the best P_win ({p_win:.3}) has better LLH {chosen:.2} and worse LLH {rejected:.2}; "
        "evaluations with a higher better and a lower worse LLH: {dominating:n}",
        front,
        lambda n: n["on_front"] == 0,
    ),
]
_TURN = [
    Condition.on(
        Arm("dpo", strength),
        "entropy {start:.2} bits at the start, {peak:.2} at its peak after {at:n} updates, {end:.2} at the end; the best "
        "P_win is at {best:n}",
        turn,
        lambda n: n["end"] < n["start"] < n["peak"],
    )
    for strength in SMALL
]
_MASS = [
    Condition.on(
        arms_of(method)[0],
        "mass {start:.3} at the start, {lowest:.3} at its lowest after {at:n} updates, {end:.3} at the end; entropy of "
        "{entropy_start:.2} bits becomes {entropy:.2}",
        masses,
        lambda n: n["end"] < n["start"],
    )
    for method in METHODS
]
_NLL = [
    Condition(
        f"β = {STRONG:g}",
        f"λ = {WEIGHTS[-1]:g} changes better LLH by {{llh:.3}} and P_win by {{p_win:.3}}",
        nll_difference,
        lambda n: abs(n["llh"]) <= LLH_MOVES and abs(n["p_win"]) < P_WIN_MOVES,
    ),
    Condition(
        f"β = {WEAK:g}",
        "; ".join(
            f"λ = {weight:g}: P_win {{p{i}:.3}} at better LLH {{llh{i}:.2}}"
            for i, weight in enumerate(WEIGHTS)
        ),
        nll_by_weight,
        lambda n: (n["p1"] - n["p0"]) * (n["p2"] - n["p1"]) < 0,
    ),
]
_LENGTH = Condition(
    "",
    f"Pearson's correlation {{r:.3}}; {{above:.3}} on better LLH above {fits.CLIP:g}",
    length_link,
    lambda n: abs(n["r"]) < PEARSON,
)

CLAIMS = (
    RequiredClaim(
        "C1",
        "Intermediate likelihood of better completions is best",
        f"of {fits.BINS} bins of better LLH with as many evaluations each, one in the middle has a mean P_win more than "
        f"{APART} above both end bins', of all evaluations and of those above {fits.CLIP:g}; above it a quadratic fit opens "
        f"downwards and has more than {REDUCTION:g} % less RMSE than a line",
        {"language": _INTERMEDIATE},
    ),
    RequiredClaim(
        "C2",
        "A larger gap between better and worse completions is not better",
        "the run of the largest gap at the end has not the best P_win there, and the evaluation of the best P_win is "
        "not on the Pareto front of high better and low worse LLH",
        {"language": _GAP},
    ),
    RequiredClaim(
        "C3",
        "Lower likelihood goes with more diversity across outputs",
        f"Spearman's correlation of EAD and better LLH below -{SPEARMAN} for each method",
        {"language": ranks("ead", "EAD", lambda n: n["rho"] < -SPEARMAN)},
    ),
    RequiredClaim(
        "C4",
        "Higher likelihood goes with more memorised facts",
        f"Spearman's correlation of fact accuracy and better LLH above {SPEARMAN} for each method",
        {"language": ranks("facts", "fact accuracy", lambda n: n["rho"] > SPEARMAN)},
    ),
    RequiredClaim(
        "C5",
        "Entropy of the likeliest tokens rises, and then falls",
        f"with DPO of β = {' and '.join(f'{s:g}' for s in SMALL)}, its peak is above the start and its end below it",
        {"language": _TURN},
    ),
    Claim(
        "C6",
        "Mass of the likeliest tokens falls",
        "with the arm of each method that moves furthest, it is lower at the end than at the start",
        {"language": _MASS},
    ),
    RequiredClaim(
        "C7",
        "An NLL term acts through likelihood alone",
        f"at the end of DPO with β = {STRONG:g}, λ = {WEIGHTS[-1]:g} changes better LLH by at most {LLH_MOVES} and P_win "
        f"by less than {P_WIN_MOVES}; with β = {WEAK:g}, P_win is not monotone in λ = "
        f"{', '.join(f'{w:g}' for w in WEIGHTS)}",
        {"language": _NLL},
    ),
    RequiredClaim(
        "C8",
        "Likelihood is not a matter of length",
        f"Pearson's correlation of better LLH and the mean length of outputs within {PEARSON} of 0",
        {"language": [_LENGTH]},
    ),
    Claim(
        "C9",
        "The stopping rule stops exactly the runs that are over-optimised (not a claim of the paper)",
        f"of runs that are not over-optimised at most {rule.RATE:.0%} raise an alarm; of those that are at most {rule.RATE:.0%} raise "
        f"none, and as many raise it early; over-optimised: P_win at the end is more than {rule.LOSS} below its best",
        {"language": [rule.rates]},
    ),
)
