"""95 % intervals: of shares by Wilson, over prompts by the bootstrap, over seeds by Student's t."""

import math
from typing import Any

import numpy as np

_RESAMPLES = 2000
Z = 1.959963984540054  # quantile of the normal distribution for 95 %


def share(values: Any) -> dict[str, float]:
    """Returns the share of true values with Wilson's interval, which is sensible at 0 and 1 too."""
    return _rounded(**bounded(np.asarray(values, bool)))


def bounded(values: Any, *, least: float = 0.0) -> dict[str, float]:
    """Returns the mean of values from `least` to 1 with Wilson's interval, not rounded.

    For zeros and ones it is Wilson's own. Values between the bounds have a smaller variance than zeros and ones of the same
    mean, which takes the place of theirs; few equal values still have an interval.
    """
    values_N = np.asarray(values, float).ravel()
    n, mean = len(values_N), float(values_N.mean())
    share = (mean - least) / (1 - least)
    variance = float(values_N.var()) / (1 - least) ** 2
    scale = 1 + Z**2 / n
    middle = (share + Z**2 / (2 * n)) / scale
    half = Z / scale * math.sqrt(variance / n + (Z / (2 * n)) ** 2)
    low, high = min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)
    return {
        "value": mean,
        **{name: least + (1 - least) * end for name, end in (("low", low), ("high", high))},
    }


def mean(values: Any) -> dict[str, float]:
    """Returns the mean over prompts with a bootstrap interval."""
    values_E = np.asarray(values, float)
    return ratio(values_E, np.ones_like(values_E))


def ratio(numerators: Any, denominators: Any) -> dict[str, float]:
    """Returns the ratio of sums over prompts with a bootstrap interval; NaN where the denominators are zero."""
    from scipy import stats

    data = np.asarray(numerators, float), np.asarray(denominators, float)

    def of_sums(top: np.ndarray, bottom: np.ndarray, axis: int = -1) -> np.ndarray:
        return top.sum(axis) / bottom.sum(axis)

    value = float(of_sums(*data)) if data[1].any() else math.nan
    if len(data[0]) < 2 or math.isnan(value):
        return _rounded(value, value, value)
    interval = stats.bootstrap(
        data,
        of_sums,
        paired=True,
        method="percentile",
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return _rounded(value, *interval)


def over_seeds(values: Any) -> dict[str, float]:
    """Returns the mean over seeds with Student's interval, which is the value itself for one seed."""
    return _rounded(**student(values))


def student(values: Any, level: float = 0.05) -> dict[str, float]:
    """Returns the mean with Student's interval, not rounded, which is the value itself for one value.

    Args:
      values: over seeds.
      level: chance that the interval misses the true value.
    """
    from scipy import stats

    values_N = np.asarray(values, float)
    n, middle = len(values_N), float(np.mean(values_N))
    half = stats.t.isf(level / 2, n - 1) * np.std(values_N, ddof=1) / math.sqrt(n) if n > 1 else 0.0
    return {"value": middle, "low": float(middle - half), "high": float(middle + half)}


def text(interval: dict[str, float], digits: int = 2) -> str:
    """Returns a value and its interval as text."""
    value, low, high = (f"{interval[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _rounded(value: float, low: float, high: float) -> dict[str, float]:
    names = ("value", "low", "high")
    return {k: round(float(v), 4) for k, v in zip(names, (value, low, high), strict=True)}
