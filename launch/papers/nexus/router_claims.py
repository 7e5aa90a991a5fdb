"""The claims of Nexus on where tokens go and on how experts' vectors lie, with what was measured for each.

Shares are of tokens of held-out rows whose first choice an expert is, mean over layers.
"""

from collections.abc import Sequence

import numpy as np

from launch.papers.nexus.arms import Runs, start
from launch.papers.shared.claim import Claim, Evidence
from launch.papers.shared.domain_claims import Judge
from launch.plots import intervals

ATTRACTED = 0.5  # of the old domains' tokens: what a new expert may take before it is trained
_EXTENDED = "ext_nexus"
_Z_LOSS = "ext_nexus_z_loss"
_LEAST = 4  # experts: an order of the three pairs of three comes about by chance


def claims(judge: Judge) -> list[Claim]:
    """All of them.

    Args:
      judge: evidence of all parts, of functions of results and where they are from.
    """
    return [
        Claim(
            "N11",
            "Domains go to the experts that were trained on them",
            "after upcycling, the largest share of each of their domains' tokens goes to its expert, mean over seeds",
            judge(_diagonal),
        ),
        Claim(
            "N12",
            "The new domain goes to the new expert before any further training",
            "at step 0 of the extension, the new expert has the largest share of the new domain's tokens, in every seed",
            judge(_at_start),
            required=True,
        ),
        Claim(
            "N13",
            "The new expert does not attract the old domains (a control, not a claim of the paper)",
            f"at step 0, at most {ATTRACTED:.0%} of the old domains' tokens go to it, and fewer than of the new one's, on the "
            "mean",
            judge(_over_attraction),
        ),
        Claim(
            "N14",
            "Similar domains keep similar experts' vectors",
            "cosines of experts' vectors rise with those of their domains (Spearman's rho over pairs, mean over layers, "
            "better than 0); the two related domains are the most similar experts in every seed",
            judge(_similar, _related),
            required=True,
        ),
    ]


def _diagonal(results: Runs, where: str) -> list[Evidence]:
    if (nexus := _own_experts(results, "nexus")) is None:
        return []
    words, holds = nexus
    if (linear := _own_experts(results, "linear")) is not None:  # for comparison: nobody claims it
        words += f"; {linear[0]}"
    return [Evidence(where, words, holds)]


def _own_experts(results: Runs, arm: str) -> tuple[str, bool] | None:
    """How many domains go to their own experts, in words and whether all do; None without a run's routing."""
    if (chosen_NDE := results.chosen(arm)) is None:
        return None
    experts = len(results.initial)
    own_NEE = chosen_NDE[
        :, 1 : 1 + experts
    ]  # rows of the domains that have experts, in their order
    right = int((own_NEE.mean(0).argmax(-1) == np.arange(experts)).sum())
    share = intervals.over_seeds(own_NEE.diagonal(axis1=1, axis2=2).mean(-1))
    words = (
        f"{results.label(arm)}: {right} of {experts} domains; their experts' share of tokens {intervals.text(share)}, "
        f"{1 / experts:.2f} by chance"
    )
    return words, right == experts


def _at_start(results: Runs, where: str) -> list[Evidence]:
    chosen_NDE = results.chosen(start(_EXTENDED))
    if chosen_NDE is None:
        return []
    new_NE = chosen_NDE[:, -1]
    share = intervals.over_seeds(new_NE[:, -1])
    largest = new_NE.argmax(-1) == new_NE.shape[-1] - 1
    words = (
        f"share of the new expert {intervals.text(share)}, the largest in {largest.sum()} of "
        f"{len(largest)} seeds"
    )
    for arm in ("ext_linear_append", "ext_linear_reset"):
        if (other := results.chosen(start(arm))) is not None:
            found = intervals.text(intervals.over_seeds(other[:, -1, -1]))
            words += f"; {results.label(arm)} {found}"
    return [Evidence(where, words, bool(largest.all()))]


def _drawn(results: Runs, arm: str) -> tuple[dict, dict] | None:
    """The new expert's shares of the old domains' tokens and of the new one's at step 0; None without routing."""
    if (chosen_NDE := results.chosen(start(arm))) is None:
        return None
    shares = (chosen_NDE[:, :-1, -1].mean(-1), chosen_NDE[:, -1, -1])
    old, new = (intervals.over_seeds(values) for values in shares)
    return old, new


def _over_attraction(results: Runs, where: str) -> list[Evidence]:
    if (drawn := _drawn(results, _EXTENDED)) is None:
        return []
    old, new = drawn
    words = f"over-attraction: {intervals.text(old)} of the old domains' tokens, {intervals.text(new)} of the new one's"
    if (with_z_loss := _drawn(results, _Z_LOSS)) is not None:
        shares = " and ".join(map(intervals.text, with_z_loss))
        words += f"; with a router z-loss of 0.001 before the extension {shares}"
    return [Evidence(where, words, old["value"] <= ATTRACTED and old["value"] < new["value"])]


def _pairs_of(cosines_NEE: np.ndarray) -> np.ndarray:
    """Those of different experts, each once: [seed, pair]."""
    upper = np.triu_indices(cosines_NEE.shape[-1], 1)
    return cosines_NEE[:, upper[0], upper[1]]


def _similar(results: Runs, where: str) -> list[Evidence]:
    from scipy import stats

    if (found := results.cosines("nexus")) is None or len(found[0]) < _LEAST:
        return []
    vectors_NP, projected_NP = map(_pairs_of, found[1:])
    rhos_N = [
        float(stats.spearmanr(one, other).statistic)
        for one, other in zip(vectors_NP, projected_NP, strict=True)
    ]
    words = f"rho over {vectors_NP.shape[1]} pairs {intervals.text(intervals.over_seeds(rhos_N))}"
    return [Evidence(where, words, intervals.significant(rhos_N))]


def _related(results: Runs, where: str) -> list[Evidence]:
    found = results.cosines("nexus")
    pair = related(found[0]) if found is not None else None
    if found is None or pair is None:
        return []
    names, _, projected_NEE = found
    i, j = pair
    own_N = projected_NEE[:, i, j]
    first_N = own_N >= _pairs_of(projected_NEE).max(-1)
    words = (
        f"{names[i]} and {names[j]}: cosine {intervals.text(intervals.over_seeds(own_N))}, the largest of all pairs in "
        f"{first_N.sum()} of {len(first_N)} seeds"
    )
    return [Evidence(where, words, bool(first_N.all()))]


def related(names: Sequence[str]) -> tuple[int, int] | None:
    """The places of two generated domains of which one has rows of the other's table; None if there are none."""
    from data.nexus import lag_domains

    for j, name in enumerate(names):
        made = lag_domains.DOMAINS.get(name)
        for i, other in enumerate(names):
            one = lag_domains.DOMAINS.get(other)
            if made is not None and one is not None and made.related_to == one.table:
                return i, j
    return None
