"""What the claims compare, from scores of all documents for all queries, and from losses after retraining. Pure numpy.

Shapes: N documents, Q queries, K ranks, S retrained models; scores are divided by the norms of the documents' gradients
where a function says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.influence import small_corpus
from espalier.launch.papers.influence.small_corpus import (
    FACT,
    GROUPS,
    PROCEDURES,
    Document,
    Query,
    source_code,
)
from espalier.trainers.influence import measures

TOP = 20  # documents that are searched for answers, and whose sources are counted
SHARE = 0.01  # of the documents: the top and bottom that masses, sources and removals are of
SOURCES = tuple(small_corpus.SIZES)
ENDS = ("top", "bottom")
MIN_NATS = 0.1  # least information of a completion that scores are divided by
# Pairs of queries -> whether their groups belong to it.
PAIRS = {
    "same procedure": lambda a, b: a == b != FACT,
    "two procedures": lambda a, b: a != b and FACT not in (a, b),
    "facts": lambda a, b: a == b == FACT,
    "fact and procedure": lambda a, b: (a == FACT) != (b == FACT),
}


def of_scores(
    scores_NQ: np.ndarray, documents: Sequence[Document], queries: Sequence[Query]
) -> dict[str, Any]:
    """Returns the statistics of one method's rankings, as JSON.

    Args:
      scores_NQ: scores; those of gradients are divided by the norms of the documents' gradients.
    """
    order_NQ = np.argsort(-scores_NQ, axis=0, kind="stable")
    return {
        "correlations": correlations(scores_NQ, [query.group for query in queries]),
        "answers": answers(order_NQ[:TOP], documents, queries),
        "sources": sources(order_NQ, documents, queries),
    }


def correlations(scores_NQ: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """Returns the mean Pearson correlation of the scores of two queries, by kind of pair; NaN where scores are constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r_QQ = np.corrcoef(scores_NQ.T)
    one, other = np.triu_indices(len(groups), 1)
    out = {}
    for name, belongs in PAIRS.items():
        chosen = [belongs(groups[int(a)], groups[int(b)]) for a, b in zip(one, other, strict=True)]
        values = r_QQ[one[chosen], other[chosen]]
        out[name] = float(values.mean()) if len(values) else float("nan")
    return out


def answers(
    top_KQ: np.ndarray, documents: Sequence[Document], queries: Sequence[Query]
) -> dict[str, dict[str, float]]:
    """Returns by group the share of queries whose answer is in a top document, and in any document at all."""
    out: dict[str, dict[str, float]] = {}
    for group in GROUPS:
        mine = [(q, query) for q, query in enumerate(queries) if query.group == group]
        found = {
            "top": [
                any(query.answer in documents[i].text for i in top_KQ[:, q]) for q, query in mine
            ],
            "corpus": [any(query.answer in one.text for one in documents) for _, query in mine],
        }
        out[group] = {name: float(np.mean(values)) for name, values in found.items()}
    return out


def sources(
    order_NQ: np.ndarray, documents: Sequence[Document], queries: Sequence[Query]
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Returns group -> number of documents -> end -> source: its share there over its share in the corpus.

    The numbers are TOP, and SHARE of all documents; a share is the mean over the group's queries.
    """
    kinds_N = np.array([one.source for one in documents])
    base = {source: max(float((kinds_N == source).mean()), 1e-12) for source in SOURCES}
    out: dict[str, Any] = {}
    for group in GROUPS:
        mine = [q for q, query in enumerate(queries) if query.group == group]
        out[group] = {}
        for name, count in (("first", TOP), ("share", removed(len(documents)))):
            ends = {"top": order_NQ[:count, mine], "bottom": order_NQ[::-1][:count, mine]}
            out[group][name] = {
                end: {
                    source: float((kinds_N[chosen] == source).mean() / base[source])
                    for source in SOURCES
                }
                for end, chosen in ends.items()
            }
    return out


def removed(documents: int) -> int:
    """Returns the number of documents that are removed: SHARE of all."""
    return max(1, round(SHARE * documents))


def masses(
    scores_NQ: np.ndarray, nats_Q: np.ndarray, queries: Sequence[Query]
) -> dict[str, dict[str, float]]:
    """Returns by group the influence per nat and the slope of the power law, of scores as they are.

    'mass' is the log of the mean over queries of the sum of the positive scores of the top SHARE, over the completion's nats;
    'slope' the mean slope of log(score) against log(rank) there.
    """
    count = removed(len(scores_NQ))
    top_KQ = np.maximum(-np.sort(-scores_NQ, axis=0)[:count], 0.0)
    per_nat_Q = top_KQ.sum(0) / np.maximum(nats_Q, MIN_NATS)
    log_rank_K = np.log(np.arange(1, count + 1))
    slopes_Q = np.full(scores_NQ.shape[1], np.nan)
    for q, values in enumerate(top_KQ.T):
        if (positive := values > 0).sum() > 2:
            slopes_Q[q] = np.polyfit(log_rank_K[positive], np.log(values[positive]), 1)[0]
    out = {}
    for group in GROUPS:
        mine = np.array([query.group == group for query in queries])
        total = per_nat_Q[mine].mean()
        out[group] = {
            "mass": float(np.log(total)) if total > 0 else float("nan"),
            "slope": float(np.nanmean(slopes_Q[mine]))
            if np.isfinite(slopes_Q[mine]).any()
            else float("nan"),
        }
    return out


def ranked_for(
    scores_NQ: np.ndarray, queries: Sequence[Query], groups: Sequence[str]
) -> np.ndarray:
    """Returns the documents, from the most influential for the queries of some groups on, [N].

    Each query's scores are divided by their deviation, so that all count alike.
    """
    mine = [q for q, query in enumerate(queries) if query.group in groups]
    scale_Q = np.maximum(scores_NQ[:, mine].std(0), 1e-30)
    return np.argsort(-(scores_NQ[:, mine] / scale_Q).sum(1), kind="stable")


def datamodelling(
    scores: Mapping[str, np.ndarray],
    halves_SN: np.ndarray,
    losses_SQ: np.ndarray,
    queries: Sequence[Query],
) -> dict[str, dict[str, float]]:
    """Returns method -> linear datamodeling score, the mean over all queries, and over those of each group.

    Args:
      scores: method -> scores [N, Q], as they are.
    """
    groups = np.array([query.group for query in queries])
    out = {}
    for method, scores_NQ in scores.items():
        lds_Q = measures.linear_datamodeling_score(scores_NQ, halves_SN, losses_SQ)
        out[method] = {"all": _mean(lds_Q)} | {
            group: _mean(lds_Q[groups == group]) for group in GROUPS
        }
    return out


def _mean(values: np.ndarray) -> float:
    """Returns the mean; constant scores predict nothing, and count as 0."""
    return float(np.nan_to_num(values).mean())


def own_share(
    table: Mapping[str, Any], procedure: str, end: str = "top", name: str = "first"
) -> float:
    """Returns how much more often a procedure's own worked examples are at an end than the other procedure's."""
    shown = table["sources"][procedure][name][end]
    (other,) = (one for one in PROCEDURES if one != procedure)
    return shown[procedure] - shown[other]


def code_share(table: Mapping[str, Any], group: str, end: str = "top") -> float:
    """Returns the multiplier of code at an end of a group's ranking: of the procedure's own, for facts the mean of both."""
    shown = table["sources"][group]["share"][end]
    kinds = PROCEDURES if group == FACT else (group,)
    return float(np.mean([shown[source_code(one)] for one in kinds]))
