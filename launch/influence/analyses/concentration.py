"""How concentrated influence is: the power law of scores by rank, and the positive influence of the top documents per nat.

Shapes: N documents.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

SHARES = (0.0001, 0.001, 0.01, 0.1, 1.0)  # of the documents


def power_law(scores_N: np.ndarray, *, top: int) -> dict[str, float] | None:
    """Returns the fit of log(score) = intercept + slope log(rank) by least squares over the top documents.

    Only positive scores have a logarithm. The 95 % interval takes deviations from the line as independent; scores are sorted,
    so that it is too narrow, and the spread over queries is the better measure.

    Args:
      scores_N: scores of documents.
      top: number of documents from the first.

    Returns:
      `slope` with `low` and `high`, `intercept`, `r2` and `documents`; None for fewer than three positive scores.
    """
    from scipy import stats

    values = np.sort(scores_N[scores_N > 0])[::-1][:top]
    if len(values) < 3:
        return None
    fit = stats.linregress(np.log(np.arange(1, len(values) + 1)), np.log(values))
    half = float(stats.t.ppf(0.975, len(values) - 2) * fit.stderr)
    slope = float(fit.slope)
    return {
        **{"slope": slope, "low": slope - half, "high": slope + half},
        **{"intercept": float(fit.intercept), "r2": float(fit.rvalue**2)},
        "documents": len(values),
    }


def cumulative(
    scores_N: np.ndarray, nats: float | None, *, shares: Sequence[float] = SHARES
) -> list[dict[str, float | None]]:
    """Returns the summed positive scores of the top documents, for parts of all documents.

    Args:
      scores_N: scores of documents.
      nats: what the sums are divided by to compare queries; None for no such sums.
      shares: parts of the documents; at least one document is taken.

    Returns:
      For each part `documents`, `per_nat`, and `share` of all positive influence (None without any); `random_per_nat` and
      `random_share` are what as many random documents have in expectation.
    """
    positive = np.sort(np.maximum(scores_N, 0.0).astype(np.float64))[::-1]
    sums, total = np.cumsum(positive), float(positive.sum())
    rows: list[dict[str, float | None]] = []
    for share in shares:
        count = max(1, math.ceil(share * len(positive)))
        own, random = float(sums[count - 1]), total * count / len(positive)
        row: dict[str, float | None] = {"part": share, "documents": count}
        for prefix, value in (("", own), ("random_", random)):
            row[f"{prefix}share"] = value / total if total else None
            row[f"{prefix}per_nat"] = value / nats if nats else None
        rows.append(row)
    return rows


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Returns the mean over queries, its 95 % interval by Student's t, and the coefficient of variation; None for no query."""
    from espalier.launch.plots import intervals

    if not values:
        return None
    shown = intervals.student(values)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    mean = shown["value"]
    return {
        **shown,
        "variation": deviation / abs(mean) if mean else math.nan,
        "queries": len(values),
    }
