"""How alike the rankings of several methods are, and what their top documents have.

Shapes: N documents, Q queries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.attribution.analyses import correlations, presence
from trainers.influence.measures import spearman


def table(
    scores: Mapping[str, np.ndarray],
    matching: Mapping[str, Mapping[int, np.ndarray]],
    *,
    top: int,
    answers: int,
) -> list[dict[str, Any]]:
    """Returns a row for each method, whose rankings are compared with those of the first.

    Args:
      scores: scores [N, Q] by method.
      matching: matching documents of each query with such a pattern, by the pattern's name ('answer', 'procedure').
      top: number of documents whose overlap is taken.
      answers: number of top documents that are searched.

    Returns:
      Rows with the mean over queries of `spearman` and `overlap` (shares of the top documents), and for each pattern's name the
      share of the queries with a matching document, None without such queries.
    """
    ranked = {method: correlations.ranked(values) for method, values in scores.items()}
    first = next(iter(scores))
    rows = []
    for method, values_NQ in scores.items():
        queries = range(values_NQ.shape[1])
        pairs = [spearman(values_NQ[:, q], scores[first][:, q]) for q in queries]
        size = min(top, len(values_NQ))
        shared = [
            len(np.intersect1d(ranked[method][:size, q], ranked[first][:size, q])) / size
            for q in queries
        ]
        rows.append(
            {
                **{"method": method, "spearman": _mean(pairs), "overlap": _mean(shared)},
                **{
                    kind: _mean(
                        [
                            bool(presence.hits(ranked[method][:, q], documents, answers))
                            for q, documents in own.items()
                        ]
                    )
                    for kind, own in matching.items()
                },
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    """Returns the mean of the values that are not NaN; None without any."""
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else None
