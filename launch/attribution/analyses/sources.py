"""Over-representation of sources, such as code, at both ends of the ranking.

A source's multiplier is its share of the top k documents divided by its share of all documents: 1 for a random ranking.

Shapes: N documents, Q queries, S sources.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.attribution.analyses.labels import OTHER_SOURCES

SIZES = (10, 50, 500, 5_000, 50_000)
_MOST = 12  # sources of a table


def sizes(documents: int) -> list[int]:
    """Returns the k that are at most half of the documents: a longer top end would reach the bottom one."""
    return [k for k in SIZES if 2 * k <= documents]


def multipliers(ranked_NQ: np.ndarray, sources_N: np.ndarray, top: int, count: int) -> np.ndarray:
    """Returns multipliers [Q, S] of the first `top` documents of each column.

    Args:
      ranked_NQ: documents of each query from one end of its ranking.
      sources_N: number of each document's source.
      top: k.
      count: S; each source has a document.
    """
    corpus_S = np.bincount(sources_N, minlength=count) / len(sources_N)
    own_kQ = sources_N[ranked_NQ[:top]]
    counts_QS = np.stack([np.bincount(column, minlength=count) for column in own_kQ.T])
    return counts_QS / min(top, len(ranked_NQ)) / corpus_S


def largest(sources: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Returns the names of the sources with most documents, and the number of each document's [N]; the rest is one source."""
    every, numbers_N, counts = np.unique(
        np.asarray(sources), return_inverse=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    largest = order if len(order) <= _MOST else order[: _MOST - 1]
    places = np.full(len(every), len(largest))
    places[largest] = np.arange(len(largest))
    names = [str(every[i]) for i in largest]
    return [*names, *([OTHER_SOURCES] if len(largest) < len(order) else [])], places[numbers_N]


def table(
    ranked_NQ: np.ndarray, sources: Sequence[str], groups: Mapping[str, list[int]]
) -> dict[str, Any]:
    """Returns the `shares` of the sources, and `rows` of mean multipliers over the queries of each group.

    Intervals are bootstraps over queries.

    Args:
      ranked_NQ: documents of each query from the highest score.
      sources: source of each document.
      groups: queries by name.
    """
    from launch.plots import intervals

    names, sources_N = largest(sources)
    shares = np.bincount(sources_N) / len(sources_N)
    rows = []
    for top in sizes(len(sources_N)):
        for end, order in (("top", ranked_NQ), ("bottom", ranked_NQ[::-1])):
            values_QS = multipliers(order, sources_N, top, len(names))
            for group, queries in groups.items():
                own = {n: intervals.mean(values_QS[queries, s]) for s, n in enumerate(names)}
                rows.append({"end": end, "documents": top, "group": group, "multipliers": own})
    return {"shares": dict(zip(names, map(float, shares), strict=True)), "rows": rows}
