"""95 % intervals of what the experiments measure: over prompts by resampling, over seeds by Student's t."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BETTER = (
    "*Better* is what a one-sided sign test over pairs of the same seed says with p <= 0.05; fewer than five "
    "pairs, which cannot say so, must all agree."
)
_LEVEL = 0.05
_RESAMPLES = 2000
_Z = 1.959964  # of a normal distribution's middle 95 %


def share(values: Any) -> dict[str, float]:
    """Share of true values, with Wilson's interval, which is sensible at 0 and 1 too."""
    flags = np.asarray(values, bool).ravel()
    n, mean = len(flags), float(flags.mean())
    centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * np.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return _rounded(mean, max(centre - half, 0.0), min(centre + half, 1.0))


def mean(values: Any) -> dict[str, float]:
    """Mean over prompts, with a bootstrap interval."""
    values_E = np.asarray(values, float)
    return ratio(values_E, np.ones_like(values_E))


def ratio(numerators: Any, denominators: Any) -> dict[str, float]:
    """Ratio of sums over prompts, with a bootstrap interval; NaN where the denominators are zero."""
    top_E, bottom_E = np.asarray(numerators, float), np.asarray(denominators, float)
    index_RE = np.random.default_rng(0).integers(len(top_E), size=(_RESAMPLES, len(top_E)))
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn_R = top_E[index_RE].sum(1) / bottom_E[index_RE].sum(1)
        value = top_E.sum() / bottom_E.sum()
    low, high = np.nanquantile(drawn_R, [0.025, 0.975]) if np.isfinite(value) else (value, value)
    return _rounded(value, low, high)


def difference(ones: Any, others: Any) -> dict[str, float]:
    """Mean difference of values of the same prompts, with a bootstrap interval."""
    return mean(np.asarray(ones, float) - np.asarray(others, float))


def over_seeds(values: Any) -> dict[str, float]:
    """Mean over runs of different seeds, with Student's interval; of one run, the run alone."""
    values_N = np.asarray(values, float)
    n, middle = len(values_N), float(np.mean(values_N))
    if n < 2:
        return _rounded(middle, middle, middle)
    from scipy import special

    half = special.stdtrit(n - 1, 0.975) * np.std(values_N, ddof=1) / math.sqrt(n)
    return _rounded(middle, middle - half, middle + half)


def sign_test(differences: Any) -> float:
    """Probability of so many positive differences, or more, if either sign were as likely.

    One-sided, for paired runs; zeros count as not positive. Of n pairs it is 2^-n at least.
    """
    values_N = np.asarray(differences, float).ravel()
    n, wins = len(values_N), int((values_N > 0).sum())
    return sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n


def significant(differences: Any) -> bool:
    """Whether a sign test says that they are positive, as BETTER has it."""
    n = np.size(differences)
    return n > 0 and sign_test(differences) <= max(_LEVEL, 0.5**n)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line."""
    return float(np.polyfit(np.asarray(x, float), np.asarray(y, float), 1)[0])


def text(found: dict[str, float], digits: int = 2) -> str:
    """Value and interval as a reader sees them."""
    value, low, high = (f"{found[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _rounded(value: float, low: float, high: float) -> dict[str, float]:
    names = ("value", "low", "high")
    return {k: round(float(v), 4) for k, v in zip(names, (value, low, high), strict=True)}
