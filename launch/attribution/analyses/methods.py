"""How alike the rankings of several methods are, and what their top documents have.

Shapes: N documents, Q queries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.attribution.analyses import correlations, presence, search
from trainers.influence.measures import spearman

RANDOM = "random"


def table(
    scores: Mapping[str, np.ndarray],
    matching: Mapping[str, Mapping[int, np.ndarray]],
    *,
    top: int,
) -> list[dict[str, Any]]:
    """Returns a row for each method, whose rankings are compared with those of the first, and one for random rankings.

    Args:
      scores: scores [N, Q] by method.
      matching: matching documents of each query with such a pattern, by the pattern's name ('answer', 'procedure').
      top: number of documents whose overlap is taken, and which are searched.

    Returns:
      Rows with the mean over queries of `spearman` and `overlap` (shares of the top documents), and for each pattern's name the
      share of the queries with a matching document, None without such queries. The last row has what rankings of all
      documents at random give in expectation.
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
                            bool(presence.hits(ranked[method][:, q], documents, top))
                            for q, documents in own.items()
                        ]
                    )
                    for kind, own in matching.items()
                },
            }
        )
    count = len(scores[first])
    by_chance = {
        kind: _mean([search.chance(count, len(documents), top) for documents in own.values()])
        for kind, own in matching.items()
    }
    overlap = min(top, count) / count
    return [*rows, {"method": RANDOM, "spearman": 0.0, "overlap": overlap, **by_chance}]


def _mean(values: Sequence[float]) -> float | None:
    """Returns the mean of the values that are not NaN; None without any."""
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else None
