"""What the claims compare, from scores of all documents for all queries, and from losses after retraining. Pure numpy.

Shapes: N documents, Q queries, K numbers of documents, S retrained models; scores are divided by the norms of the documents' gradients
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
    names,
    source_code,
)
from espalier.trainers.influence import measures

TOP = 20  # documents that are searched for answers, and whose sources are counted
SHARE = 0.01  # of the documents: the top and bottom that masses, sources and removals are of
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)  # of documents on top, of the curves
SOURCES = tuple(small_corpus.SIZES)
ENDS = ("top", "bottom")
LEAST = 0.01  # multiplier, of which logarithms are taken


# Kinds of pairs of queries; 'other words' are the two names of procedures.
PAIRS = (
    *("one procedure, other words", "two procedures, other words"),
    *("one procedure", "two procedures", "facts", "fact and procedure"),
)
# Documents of the query's procedure and of the other one -> what they are: examples under the name of which the query has no
# word, under that of the query, and code.
KINDS = OTHER_WORDS, SAME_WORDS, CODE = ("other words", "same words", "code")


def of_scores(
    scores_NQ: np.ndarray,
    documents: Sequence[Document],
    queries: Sequence[Query],
    holds_NQ: np.ndarray,
) -> dict[str, Any]:
    """Returns the statistics of one method's rankings, as JSON.

    Args:
      scores_NQ: scores; those of gradients are divided by the norms of the documents' gradients.
      documents: the documents.
      queries: the queries.
      holds_NQ: of `holds`.
    """
    order_NQ = np.argsort(-scores_NQ, axis=0, kind="stable")
    return {
        "correlations": correlations(scores_NQ, queries),
        "separation": separation(scores_NQ, documents, queries),
        "answers": answers(np.take_along_axis(holds_NQ, order_NQ, axis=0), queries),
        "sources": sources(order_NQ, documents, queries),
        "code": code(order_NQ, documents, queries),
    }


def holds(documents: Sequence[Document], queries: Sequence[Query]) -> np.ndarray:
    """Returns whether a document states a query's answer, [N, Q]: for a fact anywhere, for a procedure as the result, at its end.

    A number that is only worked on is no answer: that of `reverse` is the number in the document that reverses the answer.
    """

    def states(text: str, query: Query) -> bool:
        return query.answer in text if query.group == FACT else text.endswith(query.answer)

    texts = [one.text.rstrip("'") for one in documents]  # of code, '501'
    return np.array([[states(text, query) for query in queries] for text in texts])


def correlations(scores_NQ: np.ndarray, queries: Sequence[Query]) -> dict[str, float]:
    """Returns the mean Pearson correlation of the scores of two queries, by kind of pair; NaN where scores are constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r_QQ = np.corrcoef(scores_NQ.T)
    groups_Q = np.array([query.group for query in queries])
    facts_Q, first_Q = groups_Q == FACT, np.array([query.source in PROCEDURES for query in queries])
    same_QQ = groups_Q[:, None] == groups_Q
    both_QQ = ~facts_Q[:, None] & ~facts_Q
    other_QQ = both_QQ & (first_Q[:, None] != first_Q)
    kinds = (
        *(same_QQ & other_QQ, ~same_QQ & other_QQ, same_QQ & both_QQ, ~same_QQ & both_QQ),
        *(facts_Q[:, None] & facts_Q, facts_Q[:, None] != facts_Q),
    )
    pairs_QQ = np.triu(np.ones_like(same_QQ), 1)
    out = {}
    for name, chosen_QQ in zip(PAIRS, kinds, strict=True):
        values = r_QQ[chosen_QQ & pairs_QQ]
        out[name] = float(values.mean()) if len(values) else float("nan")
    return out


def separation(
    scores_NQ: np.ndarray, documents: Sequence[Document], queries: Sequence[Query]
) -> dict[str, dict[str, float]]:
    """Returns kind of KINDS -> source of queries -> how well scores tell documents of the query's procedure from the other's.

    That is the area under the ROC curve: the share of pairs of an own and another document of which the own one has the larger
    score, where equal scores count half. The mean over the queries of a source.
    """
    kinds_N = np.array([one.source for one in documents])
    out: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for own in PROCEDURES:
        (other,) = (one for one in PROCEDURES if one != own)
        for at, source in enumerate(names(own)):
            mine = [q for q, query in enumerate(queries) if query.source == source]
            pairs = {
                OTHER_WORDS: (names(own)[1 - at], names(other)[1 - at]),
                SAME_WORDS: (names(own)[at], names(other)[at]),
                CODE: (source_code(own), source_code(other)),
            }
            for kind, both in pairs.items():
                ours_MQ, others_MQ = (scores_NQ[kinds_N == one][:, mine] for one in both)
                areas = [area(*columns) for columns in zip(ours_MQ.T, others_MQ.T, strict=True)]
                out[kind][source] = float(np.mean(areas))
    return out


def area(ours: np.ndarray, others: np.ndarray) -> float:
    """Returns the share of pairs of which the first value is larger; equal ones count half."""
    from scipy import stats

    ranks = stats.rankdata(np.concatenate([ours, others]))[: len(ours)]
    return float((ranks.sum() - len(ours) * (len(ours) + 1) / 2) / (len(ours) * len(others)))


def answers(ranked_NQ: np.ndarray, queries: Sequence[Query]) -> dict[str, dict[str, Any]]:
    """Returns by group the share of queries whose answer is in a top document, in any document, and in the first of COUNTS.

    Args:
      ranked_NQ: whether a document has the answer, from each query's first document on.
      queries: the queries.
    """
    found_NQ = np.logical_or.accumulate(ranked_NQ, axis=0)
    out: dict[str, dict[str, Any]] = {}
    for group in GROUPS:
        mine_Q = np.array([query.group == group for query in queries])
        shares_N = found_NQ[:, mine_Q].mean(1)
        at = [float(shares_N[min(count, len(shares_N)) - 1]) for count in (TOP, *COUNTS)]
        out[group] = {"top": at[0], "corpus": float(shares_N[-1]), "curve": at[1:]}
    return out


def code(
    order_NQ: np.ndarray, documents: Sequence[Document], queries: Sequence[Query]
) -> dict[str, dict[str, Any]]:
    """Returns group -> end -> share of code there over its share in the corpus: of SHARE of all documents, and of COUNTS."""
    kinds_N = np.array([one.source for one in documents])
    code_N = np.isin(kinds_N, [source_code(one) for one in PROCEDURES])
    out: dict[str, Any] = {}
    for group in GROUPS:
        mine = [q for q, query in enumerate(queries) if query.group == group]
        ends = {"top": order_NQ[:, mine], "bottom": order_NQ[::-1, mine]}
        out[group] = {}
        for end, ordered in ends.items():
            some_N = np.cumsum(code_N[ordered].mean(1)) / code_N.mean()
            at = [some_N[min(count, len(some_N)) - 1] / min(count, len(some_N)) for count in COUNTS]
            count = share_of(len(documents))
            out[group][end] = {
                "share": float(some_N[count - 1] / count),
                "curve": [*map(float, at)],
            }
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
        for name, count in (("first", TOP), ("share", share_of(len(documents)))):
            ends = {"top": order_NQ[:count, mine], "bottom": order_NQ[::-1][:count, mine]}
            out[group][name] = {
                end: {
                    source: float((kinds_N[chosen] == source).mean() / base[source])
                    for source in SOURCES
                }
                for end, chosen in ends.items()
            }
    return out


def share_of(documents: int) -> int:
    """Returns SHARE of a number of documents, at least one."""
    return max(1, round(SHARE * documents))


def masses(
    scores_NQ: np.ndarray, nats_Q: np.ndarray, queries: Sequence[Query]
) -> dict[str, dict[str, Any]]:
    """Returns by group the influence per nat and the slope of the power law, of scores as they are.

    'mass' is the log of the positive scores of each query's top SHARE, summed over the group's queries, over the sum of their nats,
    and 'curve' the same of the first of COUNTS; 'slope' the mean slope of log(score) against log(rank) in the top SHARE.
    """
    count = share_of(len(scores_NQ))
    sorted_NQ = np.maximum(-np.sort(-scores_NQ, axis=0), 0.0)
    sums_NQ = np.cumsum(sorted_NQ, axis=0)
    log_rank_K = np.log(np.arange(1, count + 1))
    slopes_Q = np.full(scores_NQ.shape[1], np.nan)
    for q, values in enumerate(sorted_NQ[:count].T):
        if (positive := values > 0).sum() > 2:
            slopes_Q[q] = np.polyfit(log_rank_K[positive], np.log(values[positive]), 1)[0]
    out: dict[str, dict[str, Any]] = {}
    for group in GROUPS:
        mine = np.array([query.group == group for query in queries])
        total_N = sums_NQ[:, mine].sum(1) / nats_Q[mine].sum()
        out[group] = {
            "mass": _log(total_N[count - 1]),
            "curve": [_log(total_N[min(k, len(total_N)) - 1]) for k in COUNTS],
            "slope": float(np.nanmean(slopes_Q[mine]))
            if np.isfinite(slopes_Q[mine]).any()
            else float("nan"),
        }
    return out


def _log(value: float) -> float:
    return float(np.log(value)) if value > 0 else float("nan")


def ranked_for(
    scores_NQ: np.ndarray, queries: Sequence[Query], sources: Sequence[str]
) -> np.ndarray:
    """Returns the documents, from the most influential for the queries of some sources on, [N].

    Each query's scores are divided by their deviation, so that all count alike.
    """
    mine = [q for q, query in enumerate(queries) if query.source in sources]
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
