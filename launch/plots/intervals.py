"""95 % intervals: of shares by Wilson, over prompts by the bootstrap, over seeds by Student's t."""

import math
from typing import Any

import numpy as np

_RESAMPLES = 2000


def share(values: Any) -> dict[str, float]:
    """Returns the share of true values with Wilson's interval, which is sensible at 0 and 1 too."""
    from scipy import stats

    flags = np.asarray(values, bool).ravel()
    interval = stats.binomtest(int(flags.sum()), len(flags)).proportion_ci(method="wilson")
    return _rounded(flags.mean(), *interval)


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


def student(values: Any) -> dict[str, float]:
    """Returns the mean with Student's interval, not rounded, which is the value itself for one value."""
    from scipy import stats

    values_N = np.asarray(values, float)
    n, middle = len(values_N), float(np.mean(values_N))
    half = stats.t.ppf(0.975, n - 1) * np.std(values_N, ddof=1) / math.sqrt(n) if n > 1 else 0.0
    return {"value": middle, "low": float(middle - half), "high": float(middle + half)}


def text(interval: dict[str, float], digits: int = 2) -> str:
    """Returns a value and its interval as text."""
    value, low, high = (f"{interval[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _rounded(value: float, low: float, high: float) -> dict[str, float]:
    names = ("value", "low", "high")
    return {k: round(float(v), 4) for k, v in zip(names, (value, low, high), strict=True)}
