"""Numbers of the runs of one seed, of which claims make effects; None where runs are missing. Shape: E evaluations."""

from collections.abc import Callable, Sequence

import numpy as np

from launch.papers.preference import fits, results
from launch.papers.preference.results import Arm, Course, find, points

Number = Callable[[Sequence[Course]], float | None]


def middle_less(low: float, high: float, courses: Sequence[Course]) -> float | None:
    """Returns the mean P_win at middle falls of likelihood less that at falls in [low, high)."""
    both = points(courses, "fall", "p_win")
    middle, other = fits.between(*both, *fits.MIDDLE), fits.between(*both, low, high)
    return None if middle is None or other is None else middle - other


def of_fit(name: str, courses: Sequence[Course]) -> float | None:
    """Returns a number of the fit of P_win on falls of likelihood below the clip."""
    fit = fits.fit(*fits.near(*points(courses, "fall", "p_win")))
    return None if fit is None else getattr(fit, name)


def others_less_largest_gap(courses: Sequence[Course]) -> float | None:
    """Returns the mean P_win at the end of all runs but that of the largest gap, less that one's."""
    if len(courses) < 3:
        return None
    gaps, wins = (np.array([one.end(name) for one in courses]) for name in ("llh_gap", "p_win"))
    at = int(np.argmax(gaps))
    return float(np.delete(wins, at).mean() - wins[at])


def others_less_large_gaps(quantile: float, courses: Sequence[Course]) -> float | None:
    """Returns the mean P_win of evaluations whose gap is below a quantile, less that of the others."""
    gap_E, p_win_E = points(courses, "llh_gap", "p_win")
    if not gap_E.size:
        return None
    large_E = gap_E >= np.quantile(gap_E, quantile)
    return float(p_win_E[~large_E].mean() - p_win_E[large_E].mean())


def others_less_front(courses: Sequence[Course]) -> float | None:
    """Returns the mean P_win of evaluations that others surpass in better and in worse LLH, less that of all others."""
    p_win_E, chosen_E, rejected_E = points(courses, "p_win", "llh_chosen", "llh_rejected")
    higher_EE = chosen_E > chosen_E[:, None]
    lower_EE = rejected_E < rejected_E[:, None]
    surpassed_E = (higher_EE & lower_EE).any(1)
    if surpassed_E.all() or not surpassed_E.any():
        return None
    return float(p_win_E[surpassed_E].mean() - p_win_E[~surpassed_E].mean())


def spearman(score: str, method: str, beside: str, courses: Sequence[Course]) -> float | None:
    """Returns Spearman's correlation of a score and better LLH in a method's runs without an NLL term.

    Args:
      beside: another score that is held fixed (the partial correlation of ranks); empty for none.
    """
    from scipy import stats

    mine = [one for one in results.of_method(courses, method) if not one.arm.nll]
    names = ["llh_chosen", score, *([beside] if beside else [])]
    ranks = [stats.rankdata(values) for values in points(mine, *names)]
    if any(len(np.unique(values)) < 3 for values in ranks):
        return None
    r = np.corrcoef(ranks)
    if not beside:
        return float(r[0, 1])
    if max(abs(r[0, 2]), abs(r[1, 2])) > 1 - 1e-9:
        return None  # nothing is left over
    return float((r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)))


def of_arm(arm: Arm, number: Callable[[Course], float]) -> Number:
    """Returns a number of the run of one arm."""
    return lambda courses: next((number(one) for one in find(courses, arm)), None)


def rise(name: str, first: int, last: int, one: Course) -> float:
    """Returns the mean of a value after `first` to `last` updates less the one at the start."""
    return float(np.mean(one.early(name, first, last))) - one.start(name)


def change(name: str, one: Course) -> float:
    """Returns the change of a value from the start to the end."""
    return one.end(name) - one.start(name)


def difference(name: str, one: Arm, other: Arm, courses: Sequence[Course]) -> float | None:
    """Returns the value of an arm at the end less that of another."""
    ends = [[run.end(name) for run in find(courses, arm)] for arm in (one, other)]
    return ends[0][0] - ends[1][0] if all(ends) else None


def length_link(courses: Sequence[Course]) -> float | None:
    """Returns Pearson's correlation of better LLH and the length of outputs."""
    from trainers.preference.indicators import measures

    r = measures.pearson(*points(courses, "llh_chosen", "length"))
    return None if np.isnan(r) else r
