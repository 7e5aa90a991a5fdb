"""Whether answers and procedures of queries are in their top documents.

Shapes: N documents, Q queries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.attribution.analyses import search


def hits(ranked_N: np.ndarray, matching: np.ndarray, top: int) -> list[int]:
    """Returns the ranks from 1 at which one of the first `top` documents is a matching one."""
    return [int(rank) + 1 for rank in np.flatnonzero(np.isin(ranked_N[:top], matching))]


def per_query(
    ranked_NQ: np.ndarray, matching: Mapping[int, np.ndarray], top: int
) -> dict[int, dict[str, Any]]:
    """Returns what the first documents of each query with a pattern have, by query.

    Each has `top`, the number of matching documents among the first; `rank`, that of the first one, or None; `corpus`, the
    number of all matching documents; `chance`, the probability of one among as many random documents, and `expected`, the number of
    matching ones among these.
    """
    documents = len(ranked_NQ)
    result = {}
    for q, own in matching.items():
        ranks = hits(ranked_NQ[:, q], own, top)
        result[q] = {
            **{"top": len(ranks), "rank": ranks[0] if ranks else None, "corpus": len(own)},
            "chance": search.chance(documents, len(own), top),
            "expected": len(own) * min(top, documents) / documents,
        }
    return result


def table(
    ranked_NQ: np.ndarray,
    matching: Mapping[int, np.ndarray],
    groups: Mapping[str, Sequence[int]],
    correct: Sequence[bool | None],
    *,
    top: int,
) -> list[dict[str, Any]]:
    """Returns for each group of queries how many have a matching document among the first `top`.

    Of queries whose completion is marked as correct or wrong there are rows of their own: an answer that the model does not
    give is no evidence of retrieval.

    Args:
      ranked_NQ: documents of each query from the highest score.
      matching: matching documents, by query with a pattern.
      groups: queries by name.
      correct: whether each query's completion is correct; None if not known.
      top: number of documents.

    Returns:
      Rows with `share` and its Wilson interval, the share that random documents would have (`chance`), the number of
      queries whose pattern occurs in any document (`in_corpus`), and the number of matching top documents (`times`), of those
      among as many random documents (`expected`), and of different ones (`distinct`).
    """
    from launch.plots import intervals

    single = per_query(ranked_NQ, matching, top)
    rows = []
    for group, queries in groups.items():
        known = [q for q in queries if q in single]
        parts = {
            "all": known,
            "correct": [q for q in known if correct[q] is True],
            "wrong": [q for q in known if correct[q] is False],
        }
        for part, own in parts.items():
            if not own:
                continue
            tops = [np.intersect1d(ranked_NQ[:top, q], matching[q]) for q in own]
            rows.append(
                {
                    **{"group": group, "answered": part, "queries": len(own), "documents": top},
                    "share": intervals.share([single[q]["top"] > 0 for q in own]),
                    "chance": float(np.mean([single[q]["chance"] for q in own])),
                    "in_corpus": sum(single[q]["corpus"] > 0 for q in own),
                    "times": sum(len(x) for x in tops),
                    "expected": sum(single[q]["expected"] for q in own),
                    "distinct": len(np.unique(np.concatenate(tops))),
                }
            )
    return rows
