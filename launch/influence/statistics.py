"""Statistics of influence: whether queries share documents, how concentrated it is, and which layers and tokens carry it.

Correlations over many documents are driven by few of them, so Pearson's has Spearman's and the overlap of top documents beside it.

Shapes: N documents, Q queries, R resamples, L layers.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

_RESAMPLES = 2000
LEAST_QUERIES = 5  # of a bootstrap interval
SHARES = (0.0001, 0.001, 0.01, 0.1, 1.0)  # of the documents
ROUNDING = 1e-9  # of a part times the number of documents
_TENTH = 0.1
_SHOWN = 10
_BLOCK = re.compile(r"/block_(\d+)(?=/|$)")


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


def similarities(scores_NQ: np.ndarray, top: int) -> dict[str, np.ndarray]:
    """Returns `pearson`, `spearman` and `top_overlap` of all pairs of queries, each [Q, Q]."""
    return {
        "pearson": pearson(scores_NQ),
        "spearman": spearman(scores_NQ),
        "overlap": top_overlap(scores_NQ, top),
    }


def ranked(scores_NQ: np.ndarray) -> np.ndarray:
    """Returns the documents [N, Q] of each query from the highest score to the lowest; of equal ones the first is first."""
    return np.argsort(-scores_NQ, axis=0, kind="stable")


def block_mean(
    values_QQ: np.ndarray, first: Sequence[int], second: Sequence[int]
) -> dict[str, float]:
    """Returns the mean of a symmetric matrix over pairs of different queries, with a bootstrap interval over queries.

    The interval is NaN for fewer than `LEAST_QUERIES` on a side: a bootstrap over so few is much too narrow.

    Pairs share queries, so that queries are drawn, not pairs. A query that is drawn twice forms no pair with itself.

    Args:
      values_QQ: the matrix.
      first, second: the queries of both sides, equal or disjoint.
    """
    rng = np.random.default_rng(0)
    drawn_RQ = _drawn(rng, len(first))
    others_RQ = drawn_RQ if set(first) == set(second) else _drawn(rng, len(second))
    value, means_R = _pair_means(values_QQ, first, second, drawn_RQ, others_RQ)
    return _interval(value, means_R, min(len(first), len(second)))


def block_difference(
    values_QQ: np.ndarray, queries: Sequence[int], controls: Sequence[int]
) -> dict[str, float]:
    """Returns the mean of a symmetric matrix over pairs of queries minus that over pairs of a query and a control.

    The bootstrap interval draws queries and controls, and a drawn query is the same one in both means.
    """
    rng = np.random.default_rng(0)
    drawn_RQ, others_RC = (_drawn(rng, len(x)) for x in (queries, controls))
    value, means_R = _pair_means(values_QQ, queries, queries, drawn_RQ, drawn_RQ)
    other, others_R = _pair_means(values_QQ, queries, controls, drawn_RQ, others_RC)
    return _interval(value - other, means_R - others_R, min(len(queries), len(controls)))


def _interval(value: float, draws_R: np.ndarray, queries: int) -> dict[str, float]:
    known = draws_R[np.isfinite(draws_R)]
    if math.isnan(value) or not len(known):
        value = math.nan
    if math.isnan(value) or queries < LEAST_QUERIES:
        return {"value": value, "low": math.nan, "high": math.nan}
    low, high = np.percentile(known, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def _pair_means(
    values_QQ: np.ndarray,
    first: Sequence[int],
    second: Sequence[int],
    drawn_RQ: np.ndarray,
    others_RQ: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Returns the mean over pairs of different queries, and those [R] of draws; NaN where there is no pair."""
    rows, columns = np.asarray(first), np.asarray(second)
    block = np.array(values_QQ[np.ix_(rows, columns)])
    pairs = (rows[:, None] != columns[None]) & np.isfinite(block)
    block = np.where(pairs, block, 0.0)
    sums_R = np.einsum("ri,ij,rj->r", drawn_RQ, block, others_RQ)
    weights_R = np.einsum("ri,ij,rj->r", drawn_RQ, pairs.astype(float), others_RQ)
    means_R = np.divide(sums_R, weights_R, out=np.full(len(sums_R), np.nan), where=weights_R > 0)
    return float(block.sum() / pairs.sum()) if pairs.any() else math.nan, means_R


def _drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns how often each of `count` queries is drawn, [R, count]."""
    return rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(float)


def correlation_table(
    scores_NQ: np.ndarray, tasks: Sequence[str], kinds: Sequence[str], *, top: int
) -> list[dict[str, Any]]:
    """Returns rows of mean correlations: within each task, between tasks of one kind, and between kinds.

    Args:
      scores_NQ: scores of documents.
      tasks, kinds: task and kind of each query.
      top: number of documents whose overlap is taken.
    """
    matrices = similarities(scores_NQ, top)
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
        count = max(1, math.ceil(share * len(positive) - ROUNDING))
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


def block_of(path: str) -> int | None:
    """Returns the number of the block, which is the layer, in a path of parameters; None without one."""
    numbers = _BLOCK.findall(path)
    return int(numbers[0]) if numbers else None


class LayerSums:
    """Sums of the scores of top documents by matrix and layer.

    Args:
      wanted: documents of each query.
    """

    def __init__(self, wanted: Sequence[Collection[int]]):
        self._queries: dict[int, list[int]] = {}
        self.within = max(map(len, wanted), default=0)
        for q, documents in enumerate(wanted):
            for document in documents:
                self._queries.setdefault(document, []).append(q)
        self._sums: list[dict[str, float]] = [{} for _ in wanted]

    def add(self, document: int, layers: Mapping[str, Any]) -> None:
        """Adds the scores [Q] of one document by the path of each layer's matrix."""
        for q in self._queries.get(document, ()):
            sums = self._sums[q]
            for path, scores in layers.items():
                sums[path] = sums.get(path, 0.0) + float(scores[q])

    def shares(self, queries: Sequence[int]) -> dict[str, dict[str, float]]:
        """Returns shares of the summed score as means over queries, by layer and by matrix; both add up to 1.

        A share is negative where a layer pulls against the others. Queries whose sum is not positive do not count.
        """
        by_layer: Counter[str] = Counter()
        by_matrix: Counter[str] = Counter()
        count = 0
        for q in queries:
            total = sum(self._sums[q].values())
            if total <= 0:
                continue
            count += 1
            for path, value in self._sums[q].items():
                layer = block_of(path)
                by_layer["other" if layer is None else str(layer)] += value / total
                by_matrix[_BLOCK.sub("", path)] += value / total
        return {
            name: {key: value / count for key, value in own.items()} if count else {}
            for name, own in (("layers", by_layer), ("matrices", by_matrix))
        }


def tenth_share(scores: Sequence[float]) -> float:
    """Returns the share of the summed absolute influence that a tenth of the tokens has, those with most; NaN without any."""
    sizes = np.sort(np.abs(np.asarray(scores, np.float64)))[::-1]
    if not sizes.sum():
        return math.nan
    return float(sizes[: max(1, math.ceil(_TENTH * len(sizes)))].sum() / sizes.sum())


def token_table(
    rows: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """Returns for each group of queries how token influence is distributed, and the tokens with most of it.

    Args:
      rows: `query`, `document`, `scores` and `texts` of the tokens, `spurious`, of top documents.
      groups: queries by name.
    """
    result = []
    for group, queries in groups.items():
        own = [row for row in rows if row["query"] in queries]
        if not own:
            continue
        sums: Counter[str] = Counter()
        for row in own:
            for text, score in zip(row["texts"], row["scores"], strict=True):
                sums[text.strip()] += score
        del sums[""]
        shares = [tenth_share(row["scores"]) for row in own]
        shares = [share for share in shares if not math.isnan(share)]
        result.append(
            {
                **{"group": group, "documents": len(own)},
                "spurious": sum(bool(row["spurious"]) for row in own),
                "tenth_share": float(np.mean(shares)) if shares else None,
                "tokens": [[text, total] for text, total in sums.most_common(_SHOWN)],
            }
        )
    return result
