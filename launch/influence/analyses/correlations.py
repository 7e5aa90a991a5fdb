"""Whether queries of one task share their influential documents: correlations of the columns of scores.

Correlations over many documents are driven by few of them, so Pearson's has Spearman's and the overlap of top documents beside it.

Shapes: N documents, Q queries, R resamples.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

_RESAMPLES = 2000


def pearson(scores_NQ: np.ndarray) -> np.ndarray:
    """Returns the correlations [Q, Q] of the columns; NaN with a constant one."""
    centred_NQ = scores_NQ - scores_NQ.mean(0)
    norms_Q = np.linalg.norm(centred_NQ, axis=0)
    # Of equal values, the mean may differ from them by rounding.
    constant_Q = np.ptp(scores_NQ, axis=0) == 0
    unit_NQ = centred_NQ / np.where(constant_Q, np.nan, norms_Q)
    return np.clip(unit_NQ.T @ unit_NQ, -1, 1)


def spearman(scores_NQ: np.ndarray) -> np.ndarray:
    """Returns the correlations [Q, Q] of the columns' ranks; equal scores share their mean rank."""
    from scipy import stats

    return pearson(stats.rankdata(scores_NQ, axis=0))


def top_overlap(scores_NQ: np.ndarray, top: int) -> np.ndarray:
    """Returns the shares [Q, Q] of the `top` documents that two queries have in common."""
    sets = [set(column) for column in ranked(scores_NQ)[:top].T]
    size = min(top, len(scores_NQ))
    return np.array([[len(x & y) / size for y in sets] for x in sets])


def ranked(scores_NQ: np.ndarray) -> np.ndarray:
    """Returns the documents [N, Q] of each query from the highest score to the lowest; of equal ones the first is first."""
    return np.argsort(-scores_NQ, axis=0, kind="stable")


def block_mean(
    values_QQ: np.ndarray, first: Sequence[int], second: Sequence[int]
) -> dict[str, float]:
    """Returns the mean of a symmetric matrix over pairs of different queries, with a bootstrap interval over queries.

    Pairs share queries, so that queries are drawn, not pairs. A query that is drawn twice forms no pair with itself.

    Args:
      values_QQ: the matrix.
      first, second: the queries of both sides, equal or disjoint.
    """
    rows, columns = np.asarray(first), np.asarray(second)
    within = set(first) == set(second)
    block = np.array(values_QQ[np.ix_(rows, columns)])
    pairs = rows[:, None] != columns[None]
    pairs &= np.isfinite(block)
    if not pairs.any():
        return {"value": np.nan, "low": np.nan, "high": np.nan}
    block = np.where(pairs, block, 0.0)
    rng = np.random.default_rng(0)
    drawn_RQ = _drawn(rng, len(rows))
    others_RQ = drawn_RQ if within else _drawn(rng, len(columns))
    sums_R = np.einsum("ri,ij,rj->r", drawn_RQ, block, others_RQ)
    weights_R = np.einsum("ri,ij,rj->r", drawn_RQ, pairs.astype(float), others_RQ)
    means_R = sums_R[weights_R > 0] / weights_R[weights_R > 0]
    low, high = np.percentile(means_R, [2.5, 97.5])
    value = float(block.sum() / pairs.sum())
    return {"value": value, "low": float(low), "high": float(high)}


def _drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns how often each of `count` queries is drawn, [R, count]."""
    return rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(float)


def table(
    scores_NQ: np.ndarray, tasks: Sequence[str], kinds: Sequence[str], *, top: int
) -> list[dict[str, Any]]:
    """Returns rows of mean correlations: within each task, between tasks of one kind, and between kinds.

    Args:
      scores_NQ: scores of documents.
      tasks, kinds: task and kind of each query.
      top: number of documents whose overlap is taken.
    """
    matrices = {
        "pearson": pearson(scores_NQ),
        "spearman": spearman(scores_NQ),
        "overlap": top_overlap(scores_NQ, top),
    }
    by_task: dict[tuple[str, str], list[int]] = {}
    for q, names in enumerate(zip(kinds, tasks, strict=True)):
        by_task.setdefault(names, []).append(q)
    blocks = [((*a, *a), own, own) for a, own in by_task.items()]
    blocks += [
        ((*a, *b), own, others)
        for (a, own), (b, others) in itertools.combinations(by_task.items(), 2)
    ]
    rows: list[dict[str, Any]] = []
    for (kind, task, other_kind, other_task), own, others in blocks:
        pairs = len(own) * (len(own) - 1) // 2 if own == others else len(own) * len(others)
        if pairs:
            rows.append(
                {
                    **{"kind": kind, "task": task},
                    **{"other_kind": other_kind, "other_task": other_task, "pairs": pairs},
                    **{name: block_mean(x, own, others) for name, x in matrices.items()},
                }
            )
    return rows
