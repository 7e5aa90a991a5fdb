"""The claims on likelihood and quality, with what was measured for each.

The course of training, an NLL term and the stopping rule are in course_claims.py and rule_claims.py.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.preference import course_claims, fits, results, rule_claims
from launch.papers.preference.arms import METHODS
from launch.papers.preference.evidence import WHERE, Numbers, Part, judge
from launch.papers.preference.results import Course
from launch.papers.shared import claim
from launch.papers.shared.claim import Claim

APART = 0.05  # of P_win, by which the middle beats both ends
REDUCTION = 15.0  # per cent of RMSE
SPEARMAN = 0.5
PEARSON = 0.2


def claims(found: Mapping[str, Any]) -> list[Claim]:
    """All of them, of what `experiment.run` has found: on the methods that learn from pairs."""
    every = results.direct(results.courses(found))
    judged = [
        _intermediate(every),
        _gap(every),
        _diversity(every),
        _facts(every),
        *course_claims.claims(every),
        _length(every),
        rule_claims.claim(every),
    ]
    return claim.placed(judged, {"language": WHERE})


def _intermediate(every: Sequence[Course]) -> Claim:
    bins = [
        Part(
            of,
            "P_win {low:.3} in the lowest bin of better LLH, {middle:.3} in the best between, {high:.3} in the highest",
            functools.partial(_bins, select),
            lambda n: n["middle"] - max(n["low"], n["high"]) > APART,
        )
        for of, select in (("all evaluations", _all), (f"above {fits.CLIP:g}", fits.above))
    ]
    parabola = Part(
        f"above {fits.CLIP:g}",
        "quadratic term {curvature:.3}, RMSE {line:.3} of a line and {parabola:.3} of a parabola, {reduction:.1} % "
        "less (with the tail {with_tail:.1} %)",
        _parabola,
        lambda n: n["curvature"] < 0 and n["reduction"] > REDUCTION,
    )
    return Claim(
        "C1",
        "Intermediate likelihood of better completions is best",
        f"of {fits.BINS} bins of better LLH with as many evaluations each, one in the middle has a mean P_win more than "
        f"{APART} above both end bins', of all evaluations and of those above {fits.CLIP:g}; above it a quadratic fit opens "
        f"downwards and has more than {REDUCTION:g} % less RMSE than a line",
        judge(every, (*bins, parabola)),
        required=True,
    )


def _all(x_E: np.ndarray, y_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x_E, y_E


def _bins(
    select: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    every: Sequence[Course],
) -> Numbers | None:
    x_E, y_E = select(*results.points(every, "llh_chosen", "p_win"))
    if len(x_E) < 2 * fits.BINS:
        return None
    _, means = fits.binned(x_E, y_E)
    return {"low": means[0], "middle": max(means[1:-1]), "high": means[-1]}


def _parabola(every: Sequence[Course]) -> Numbers | None:
    points = results.points(every, "llh_chosen", "p_win")
    found, whole = fits.fit(*fits.above(*points)), fits.fit(*points)
    if found is None or whole is None:
        return None
    return {
        "curvature": found.curvature,
        "line": found.rmse_line,
        "parabola": found.rmse_parabola,
        "reduction": found.reduction,
        "with_tail": whole.reduction,
    }


def _gap(every: Sequence[Course]) -> Claim:
    largest = Part(
        "",
        "at the end the run of the largest gap ({gap:.2}) has P_win {p_win:.3}, the best run {best:.3}",
        _largest_gap,
        lambda n: n["is_best"] == 0,
    )
    front = Part(
        "",
        "the evaluation of the best P_win ({p_win:.3}) has better LLH {chosen:.2} and worse LLH {rejected:.2}; "
        "evaluations with a higher better and a lower worse LLH: {dominating:n}",
        _front,
        lambda n: n["on_front"] == 0,
    )
    return Claim(
        "C2",
        "A larger gap between better and worse completions is not better",
        "the run of the largest gap at the end has not the best P_win there, and the evaluation of the best P_win is "
        "not on the Pareto front of high better and low worse LLH",
        judge(every, (largest, front)),
        required=True,
    )


def _largest_gap(every: Sequence[Course]) -> Numbers | None:
    if len(every) < 2:
        return None
    gaps, wins = (np.array([one.end(name) for one in every]) for name in ("llh_gap", "p_win"))
    at = int(np.argmax(gaps))
    return {
        "gap": gaps[at],
        "p_win": wins[at],
        "best": wins.max(),
        "is_best": float(at == np.argmax(wins)),
    }


def _front(every: Sequence[Course]) -> Numbers | None:
    p_win, chosen, rejected = results.points(every, "p_win", "llh_chosen", "llh_rejected")
    if not p_win.size:
        return None
    at = int(np.argmax(p_win))
    dominating = int(((chosen > chosen[at]) & (rejected < rejected[at])).sum())
    return {
        "p_win": p_win[at],
        "chosen": chosen[at],
        "rejected": rejected[at],
        "dominating": dominating,
        "on_front": float(not dominating),
    }


def _diversity(every: Sequence[Course]) -> Claim:
    return Claim(
        "C3",
        "Lower likelihood goes with more diversity across outputs",
        f"Spearman's correlation of EAD and better LLH below -{SPEARMAN} for each method",
        judge(every, _ranks("ead", "EAD", lambda n: n["rho"] < -SPEARMAN)),
        required=True,
    )


def _facts(every: Sequence[Course]) -> Claim:
    return Claim(
        "C4",
        "Higher likelihood goes with what is memorised",
        f"Spearman's correlation of fact accuracy and better LLH above {SPEARMAN} for each method",
        judge(every, _ranks("facts", "fact accuracy", lambda n: n["rho"] > SPEARMAN)),
        required=True,
    )


def _ranks(score: str, name: str, holds: Callable[[Numbers], bool]) -> list[Part]:
    """Spearman's correlation with better LLH, over all evaluations of each method."""

    def numbers(method: str) -> Callable[[Sequence[Course]], Numbers | None]:
        def of(every: Sequence[Course]) -> Numbers | None:
            mine = [one for one in every if one.arm.method == method]
            x_E, y_E = results.points(mine, "llh_chosen", score)
            if min(len(np.unique(x_E)), len(np.unique(y_E))) < 2:
                return None
            from scipy import stats

            return {"rho": float(stats.spearmanr(x_E, y_E).statistic), "count": len(x_E)}

        return of

    words = f"Spearman's correlation of {name} and better LLH {{rho:.2}}, {{count:n}} evaluations"
    return [Part(label, words, numbers(method), holds) for method, (label, _) in METHODS.items()]


def _length(every: Sequence[Course]) -> Claim:
    part = Part(
        "",
        f"Pearson's correlation {{r:.3}}; {{above:.3}} on better LLH above {fits.CLIP:g}",
        _length_link,
        lambda n: abs(n["r"]) < PEARSON,
    )
    return Claim(
        "C8",
        "Likelihood is not a matter of length",
        f"Pearson's correlation of better LLH and the mean length of outputs within {PEARSON} of 0",
        judge(every, (part,)),
        required=True,
    )


def _length_link(every: Sequence[Course]) -> Numbers | None:
    from trainers.preference.indicators import measures

    points = results.points(every, "llh_chosen", "length")
    found = [measures.pearson(*some) for some in (points, fits.above(*points))]
    return None if np.isnan(found).any() else dict(zip(("r", "above"), found, strict=True))
