"""All analyses of one file of scores, as JSON values.

A source's multiplier is its share of the top k documents divided by its share of all documents: 1 for a random ranking.

Shapes: N documents, Q queries, S sources.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.influence import labels, statistics
from espalier.launch.influence.labels import OTHER_SOURCES, Query
from espalier.trainers.influence.measures import spearman

RANDOM = "random"
SIZES = (10, 50, 500, 5_000, 50_000)
_MOST = 12  # sources of a table
LEAST_NATS = 0.1  # what a score is divided by at least
MOST_SEARCHED = 500
_FITTED = 500


def compared(
    scores: Mapping[str, np.ndarray],
    matching: Mapping[str, Mapping[int, np.ndarray]],
    *,
    top: int,
) -> list[dict[str, Any]]:
    """Returns a row for each method, which compares its rankings with the first method's, and a row for random rankings.

    Args:
      scores: scores [N, Q] by method.
      matching: matching documents of each query with such a pattern, by the pattern's name ('answer', 'procedure').
      top: number of documents whose overlap is taken, and which are searched.

    Returns:
      Rows with the mean over queries of `spearman` and `overlap` (shares of the top documents), and for each pattern's name the
      share of the queries with a matching document, None without such queries. The last row has what rankings of all
      documents at random give in expectation.
    """
    ranked = {method: statistics.ranked(values) for method, values in scores.items()}
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
                            bool(labels.hits(ranked[method][:, q], documents, top))
                            for q, documents in own.items()
                        ]
                    )
                    for kind, own in matching.items()
                },
            }
        )
    count = len(scores[first])
    by_chance = {
        kind: _mean([labels.chance(count, len(documents), top) for documents in own.values()])
        for kind, own in matching.items()
    }
    overlap = min(top, count) / count
    return [*rows, {"method": RANDOM, "spearman": 0.0, "overlap": overlap, **by_chance}]


def by_query(scores: Mapping[str, np.ndarray], *, top: int) -> dict[str, list[dict[str, float]]]:
    """Returns for each query the `spearman` and `overlap` (share of the top documents) with the first scores, by other scores' name."""
    (_, first_NQ), *others = scores.items()
    first_kQ = statistics.ranked(first_NQ)[:top]
    return {
        name: [
            {
                "spearman": spearman(own_NQ[:, q], first_NQ[:, q]),
                "overlap": len(np.intersect1d(column_k, first_kQ[:, q])) / len(first_kQ),
            }
            for q, column_k in enumerate(statistics.ranked(own_NQ)[:top].T)
        ]
        for name, own_NQ in others
    }


def by_kind(
    similar: Mapping[str, Sequence[Mapping[str, float]]], groups: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """Returns rows of `by_query`, as means over the queries of each group, with the largest Spearman correlation as `most`."""
    rows = []
    for group, queries in groups.items():
        for name, own in similar.items():
            known = [x for q in queries if not np.isnan(x := own[q]["spearman"])]
            rows.append(
                {
                    **{"group": group, "method": name, "queries": len(queries)},
                    **{"spearman": statistics.spread(known), "most": max(known, default=None)},
                    "overlap": statistics.spread([own[q]["overlap"] for q in queries]),
                }
            )
    return rows


def controls(given: "Inputs") -> list[dict[str, Any]]:
    """Returns rows that compare the queries of each kind with its controls, whose prompts state the answer.

    Where queries are similar because of their form, a query is as similar to a control of this form as to another query.

    Returns:
      For each kind and similarity (`measure`) its mean over pairs `of_queries`, `of_controls`, and `between` a query and a control,
      and the `difference` of the first and the last.
    """
    rows: list[dict[str, Any]] = []
    kinds = {query.kind: None for query in given.queries if query.control}
    matrices = statistics.similarities(given.scores_NQ, given.within) if kinds else {}
    for kind in kinds:
        own, stated = (
            [q for q, x in enumerate(given.queries) if x.kind == kind and x.control is control]
            for control in (False, True)
        )
        for measure, values_QQ in matrices.items() if own else ():
            means = {
                "of_queries": statistics.block_mean(values_QQ, own, own),
                "between": statistics.block_mean(values_QQ, own, stated),
                "of_controls": statistics.block_mean(values_QQ, stated, stated),
                "difference": statistics.block_difference(values_QQ, own, stated),
            }
            rows.append({"kind": kind, "measure": measure, **means})
    return rows


def _mean(values: Sequence[float]) -> float | None:
    """Returns the mean of the values that are not NaN; None without any."""
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else None


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


def represented(
    ranked_NQ: np.ndarray, sources: Sequence[str], groups: Mapping[str, list[int]]
) -> dict[str, Any]:
    """Returns the `shares` of the sources, and `rows` of mean multipliers over the queries of each group.

    Intervals are bootstraps over queries; NaN for fewer than `statistics.LEAST_QUERIES`.

    Args:
      ranked_NQ: documents of each query from the highest score.
      sources: source of each document.
      groups: queries by name.
    """
    from espalier.launch.plots import intervals

    names, sources_N = largest(sources)
    shares = np.bincount(sources_N) / len(sources_N)
    rows = []
    for top in sizes(len(sources_N)):
        for end, order in (("top", ranked_NQ), ("bottom", ranked_NQ[::-1])):
            values_QS = multipliers(order, sources_N, top, len(names))
            for group, queries in groups.items():
                own = {n: intervals.mean(values_QS[queries, s]) for s, n in enumerate(names)}
                if len(queries) < statistics.LEAST_QUERIES:
                    unknown = {"low": math.nan, "high": math.nan}
                    own = {n: {**mean, **unknown} for n, mean in own.items()}
                rows.append({"end": end, "documents": top, "group": group, "multipliers": own})
    return {"shares": dict(zip(names, map(float, shares), strict=True)), "rows": rows}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is analysed.

    Attributes:
      scores_NQ: scores, or scores divided by norms.
      queries: with their labels.
      nats: what sums of a query are divided by; None where it is not known.
      sources: source of each document; None without any.
      matching: numbers of the documents that have the pattern of a query, by (name of the pattern, query); None if the
        documents were not searched.
      layers: sums by layer of top documents; None if rows have none.
      tokens: rows of token scores.
      method: of the scores.
      others: scores of other methods by name.
      within: number of top documents that are searched.
    """

    scores_NQ: np.ndarray
    queries: Sequence[Query]
    nats: Sequence[float | None]
    sources: Sequence[str] | None
    matching: Mapping[tuple[str, int], np.ndarray] | None
    layers: statistics.LayerSums | None
    tokens: Sequence[Mapping[str, Any]]
    method: str
    others: Mapping[str, np.ndarray]
    within: int


def searched(documents: int) -> int:
    """Returns the number of top documents that are searched by default: a hundredth of all, from 10 to 500."""
    return min(documents, max(10, min(MOST_SEARCHED, documents // 100)))


def analyse(given: Inputs) -> dict[str, Any]:
    """Returns the analyses by name, and under `omitted` which are not possible with these files, and why."""
    groups = labels.groups(given.queries)
    ranked_NQ = statistics.ranked(given.scores_NQ)
    result: dict[str, Any] = {"within": given.within}
    omitted: list[str] = []
    if len(given.queries) > 1:
        result["random_overlap"] = min(given.within, len(given.scores_NQ)) / len(given.scores_NQ)
        tasks = [query.task for query in given.queries]
        kinds = [query.group for query in given.queries]
        result["correlations"] = statistics.correlation_table(
            given.scores_NQ, tasks, kinds, top=given.within
        )
    else:
        omitted.append("Correlations need two queries.")
    result["power_law"], fits = _power_laws(given, groups)
    result["power_law_of_queries"] = fits
    result["cumulative"] = _cumulative(given, groups, statistics.SHARES)
    count = len(given.scores_NQ)
    steps = [m * 10**e for e in range(len(str(count))) for m in (1, 2, 5)]  # of documents
    parts = [k / count for k in steps if k < count]
    result["curves"] = _cumulative(given, groups, [*parts, 1.0])
    if given.sources is None:
        omitted.append('Sources need documents with a "source".')
    else:
        result["sources"] = represented(ranked_NQ, given.sources, groups)
    by_name = _by_name(given)
    correct = [query.correct for query in given.queries]
    for name in ("answer", "procedure"):
        if name in by_name:
            result[name] = labels.presence_table(
                ranked_NQ, by_name[name], groups, correct, top=given.within
            )
            result[f"{name}_of_queries"] = labels.per_query(ranked_NQ, by_name[name], given.within)
        elif given.matching is None:
            omitted.append(f"The search for a query's {name} needs a file of documents.")
        else:
            omitted.append(f'The search for the {name} of a query needs queries with "{name}".')
    if made := controls(given):
        result["controls"] = made
    else:
        omitted.append('Controls need queries with "control", and others of the same kind.')
    if given.layers is not None:
        result["layers_within"] = given.layers.within
        result["layers"] = {group: given.layers.shares(own) for group, own in groups.items()}
    else:
        omitted.append("Layers need `score --per_layer`.")
    if given.tokens:
        result["tokens"] = statistics.token_table(given.tokens, groups)
    else:
        omitted.append("Tokens need `score --token_scores=N`.")
    if given.others:
        every = {given.method: given.scores_NQ, **given.others}
        result["methods"] = compared(every, by_name, top=given.within)
        similar = by_query(every, top=given.within)
        result["methods_of_kinds"] = by_kind(similar, groups)
        result["methods_of_queries"] = similar
    result["omitted"] = omitted
    return result


def _by_name(given: Inputs) -> dict[str, dict[int, np.ndarray]]:
    result: dict[str, dict[int, np.ndarray]] = {}
    for (name, query), documents in (given.matching or {}).items():
        result.setdefault(name, {})[query] = documents
    return result


def _power_laws(given: Inputs, groups: Mapping[str, Sequence[int]]) -> tuple[list[Any], list[Any]]:
    """Returns rows of mean slopes by group, and the fit of each query."""
    top = min(_FITTED, max(10, len(given.scores_NQ) // 10))
    fits = [statistics.power_law(column, top=top) for column in given.scores_NQ.T]
    rows = []
    for group, own in groups.items():
        parts_ = {"all": own}
        parts_["correct"] = [q for q in own if given.queries[q].correct is True]
        parts_["wrong"] = [q for q in own if given.queries[q].correct is False]
        for part, chosen in parts_.items():
            slopes = [fit["slope"] for q in chosen if (fit := fits[q]) is not None]
            if slopes:
                rows.append(
                    {
                        **{"group": group, "answered": part, "documents": top},
                        "slope": statistics.spread(slopes),
                    }
                )
    return rows, fits


def _cumulative(
    given: Inputs, groups: Mapping[str, Sequence[int]], parts: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns rows of the positive influence of top documents, by group and part of the documents."""
    by_query = [
        statistics.cumulative(column, nats, shares=parts)
        for column, nats in zip(given.scores_NQ.T, given.nats, strict=True)
    ]
    rows = []
    for p, part in enumerate(parts):
        if part * len(given.scores_NQ) < 1 - statistics.ROUNDING:
            continue
        count = by_query[0][p]["documents"]
        for group, own in groups.items():
            values = {
                name: [value for q in own if (value := by_query[q][p][name]) is not None]
                for name in ("share", "per_nat", "random_share", "random_per_nat")
            }
            rows.append(
                {
                    **{"part": part, "documents": count, "group": group},
                    **{name: statistics.spread(own) for name, own in values.items()},
                }
            )
    return rows
