"""All analyses of one file of scores, as JSON values.

Shapes: N documents, Q queries.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.attribution.analyses import (
    concentration,
    correlations,
    labels,
    methods,
    parts,
    presence,
    sources,
)
from launch.attribution.analyses.labels import Query

MOST_SEARCHED = 500
_FITTED = 500


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
    layers: parts.LayerSums | None
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
    ranked_NQ = correlations.ranked(given.scores_NQ)
    result: dict[str, Any] = {"within": given.within}
    omitted: list[str] = []
    if len(given.queries) > 1:
        result["random_overlap"] = min(given.within, len(given.scores_NQ)) / len(given.scores_NQ)
        tasks = [query.task for query in given.queries]
        kinds = [query.kind for query in given.queries]
        result["correlations"] = correlations.table(given.scores_NQ, tasks, kinds, top=given.within)
    else:
        omitted.append("Correlations need two queries.")
    result["power_law"], fits = _power_laws(given, groups)
    result["power_law_of_queries"] = fits
    result["cumulative"] = _cumulative(given, groups)
    if given.sources is None:
        omitted.append('Sources need documents with a "source".')
    else:
        result["sources"] = sources.table(ranked_NQ, given.sources, groups)
    by_name = _by_name(given)
    correct = [query.correct for query in given.queries]
    for name in ("answer", "procedure"):
        if name in by_name:
            result[name] = presence.table(
                ranked_NQ, by_name[name], groups, correct, top=given.within
            )
            result[f"{name}_of_queries"] = presence.per_query(
                ranked_NQ, by_name[name], given.within
            )
        elif given.matching is None:
            omitted.append(f"The search for a query's {name} needs a file of documents.")
        else:
            omitted.append(f'The search for the {name} of a query needs queries with "{name}".')
    if given.layers is not None:
        result["layers"] = {group: given.layers.shares(own) for group, own in groups.items()}
    else:
        omitted.append("Layers need `score --per_layer`.")
    if given.tokens:
        result["tokens"] = parts.token_table(given.tokens, groups)
    else:
        omitted.append("Tokens need `score --token_scores=N`.")
    if given.others:
        every = {given.method: given.scores_NQ, **given.others}
        result["methods"] = methods.table(every, by_name, top=given.within)
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
    fits = [concentration.power_law(column, top=top) for column in given.scores_NQ.T]
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
                        "slope": concentration.spread(slopes),
                    }
                )
    return rows, fits


def _cumulative(given: Inputs, groups: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Returns rows of the positive influence of top documents, by group and part of the documents."""
    by_query = [
        concentration.cumulative(column, nats)
        for column, nats in zip(given.scores_NQ.T, given.nats, strict=True)
    ]
    rows = []
    for p, part in enumerate(concentration.SHARES):
        if part * len(given.scores_NQ) < 1:
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
                    **{name: concentration.spread(own) for name, own in values.items()},
                }
            )
    return rows
