"""Seeds in blocks: when runs may stop, the power that numbers of seeds have, and the smallest effect that they can show.

Values over seeds are taken as normal. At each look the mean's Student interval is compared with the bounds of a claim; the
first look that decides ends it. Looking more than once would raise the error, so that the interval of a look is wider than
one of 95 %: the chance that any of them misses the true value is 5 % in all, spent in proportion to the seeds (alpha
spending, Lan and DeMets 1983, with the linear spending function).
"""

import functools
import math

import numpy as np

ERROR = 0.05  # of all looks together, on both sides
POWER = 0.8  # that plans ask for
_PATHS = 200_000  # simulated; the error of a level is about one per cent of it


@functools.cache
def levels(looks: tuple[int, ...]) -> tuple[float, ...]:
    """Returns the level of the interval at each look: 0.05 for one look alone, less for each of several.

    Args:
      looks: numbers of seeds, increasing, at least two.

    Raises:
      ValueError: other numbers.
    """
    if not looks or looks[0] < 2 or any(b <= a for a, b in zip(looks, looks[1:], strict=False)):
        raise ValueError(
            f"{looks} are no numbers of seeds: they begin at two or more and increase."
        )
    if len(looks) == 1:
        return (ERROR,)
    from scipy import stats

    draws_PN = np.random.default_rng(0).standard_normal((_PATHS, looks[-1]))
    out, before, going_P = [], 0, np.ones(_PATHS, bool)
    for look in looks:
        p_P = 2 * stats.t.sf(np.abs(_t(draws_PN[:, :look])), look - 1)
        spent = ERROR * (look - before) / looks[-1] * _PATHS  # paths that may end here
        level = float(np.partition(p_P[going_P], round(spent))[round(spent)])
        going_P &= p_P >= level
        out.append(level)
        before = look
    return tuple(out)


def _t(values_PN: np.ndarray) -> np.ndarray:
    """Returns Student's statistic [P] of the values of each path."""
    return values_PN.mean(1) / (values_PN.std(1, ddof=1) / math.sqrt(values_PN.shape[1]))


def power(distance: float, sd: float, seeds: int, level: float = ERROR) -> float:
    """Returns the chance that the interval of so many seeds lies beyond a bound.

    Args:
      distance: of the true value from the bound, on the side that is to be shown.
      sd: deviation over seeds.
      seeds: their number, at least two.
      level: of the interval.
    """
    from scipy import stats

    if sd == 0:
        return float(distance > 0)
    t = stats.t.isf(level / 2, seeds - 1)
    return float(stats.nct.sf(t, seeds - 1, distance / sd * math.sqrt(seeds)))


def planned_power(distance: float, sd: float, looks: tuple[int, ...]) -> float:
    """Returns the chance that one of several looks shows the effect, and no earlier one its contrary.

    Args:
      distance: of the true value from the bound, on the side that is to be shown.
      sd: deviation over seeds.
      looks: numbers of seeds.
    """
    from scipy import stats

    if len(looks) == 1 or sd == 0:
        return power(distance, sd, looks[0])
    draws_PN = np.random.default_rng(1).normal(distance / sd, 1.0, (_PATHS // 4, looks[-1]))
    shown, going_P = 0, np.ones(len(draws_PN), bool)
    for look, level in zip(looks, levels(looks), strict=True):
        t_P, least = _t(draws_PN[:, :look]), stats.t.isf(level / 2, look - 1)
        shown += int((going_P & (t_P > least)).sum())
        going_P &= np.abs(t_P) <= least
    return shown / len(draws_PN)


def smallest(sd: float, seeds: int, level: float = ERROR) -> float:
    """Returns the distance from a bound that so many seeds show with a power of 80 %, in the unit of `sd`."""
    from scipy import optimize

    if sd == 0:
        return 0.0
    return sd * float(optimize.brentq(lambda d: power(d, 1.0, seeds, level) - POWER, 0.0, 100.0))
