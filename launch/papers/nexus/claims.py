"""The claims of Nexus and how each is measured.

Arms of the same seed share the seed model, the experts and the data with their order, so that they are compared in
pairs. Before the extension losses are means over the general domain and those of the experts; after it the new domain
is judged by itself. Shares are of tokens of held-out rows whose first choice an expert is, mean over layers.
"""

import functools
from collections.abc import Sequence

import numpy as np

from launch.papers.nexus.arms import BUDGETS, CONTINUED, MERGED, NEW, OLD, SEED, Runs, start
from launch.papers.shared import domains, results
from launch.papers.shared.claim import Claim, Evidence, RequiredClaim
from launch.papers.shared.domains import everywhere
from launch.plots import intervals

FLAT = 0.02  # of the loss on the old domains: what an extension may cost, on the mean over seeds
ATTRACTED = 0.5  # of the old domains' tokens, which a new expert may take before it is trained
RESET, APPENDED, EXTENDED = "ext_linear_reset", "ext_linear_append", "ext_nexus"
_Z_LOSS = "ext_nexus_z_loss"
_LEAST = 4  # experts: an order of the three pairs of three comes about by chance

_pairs = functools.partial(domains.pairs, score=OLD)


def _at_budgets(*pairs: tuple[str, str], steps: Sequence[int] = BUDGETS, no_worse: bool = False):
    """Returns measures of whether the first arm of each pair has the lower loss on the new domain after so many updates."""
    return [_pairs(*pairs, score=NEW, step=step, no_worse=no_worse) for step in steps]


def shrinking(runs: Runs, where: str) -> list[Evidence]:
    """Compares the gap on the new domain at the smallest budget with that at each other budget."""
    first, *later = BUDGETS
    gaps = {}
    for step in BUDGETS:
        at = runs.at(step)
        gaps[step] = at.scores(RESET, NEW) - at.scores(EXTENDED, NEW)
    out = []
    for step in later:
        shrunk = (gaps[first] - gaps[step]).dropna()
        if not shrunk.empty:
            words = "; ".join(
                f"gap at {s} updates {runs.mean(gaps[s][shrunk.index], NEW)}" for s in (first, step)
            )
            out.append(Evidence(where, words, intervals.significant(shrunk)))
    return out


def flat(runs: Runs, where: str, *, step: int) -> list[Evidence]:
    """Measures by how much an extension changes the loss on the old domains."""
    after, before = results.aligned(runs.at(step).scores(EXTENDED, OLD), runs.scores("nexus", OLD))
    if not len(after):
        return []
    change = results.change(after, before)
    words = (
        f"{OLD}: before {runs.mean(before, OLD)}, after {runs.mean(after, OLD)}; change "
        f"{intervals.text(change, 1)} %"
    )
    return [Evidence(f"{where}, {step} updates", words, change["value"] <= 100 * FLAT)]


def diagonal(runs: Runs, where: str) -> list[Evidence]:
    """Counts the domains that go to their own experts after upcycling."""
    if (nexus := _own_experts(runs, "nexus")) is None:
        return []
    words, holds = nexus
    if (linear := _own_experts(runs, "linear")) is not None:  # for comparison: not claimed
        words += f"; {linear[0]}"
    return [Evidence(where, words, holds)]


def _own_experts(runs: Runs, arm: str) -> tuple[str, bool] | None:
    """Returns how many domains go to their own experts, in words, and whether all do; None without routing."""
    if (chosen_NDE := runs.chosen(arm)) is None:
        return None
    experts = len(runs.initial)
    own_NEE = chosen_NDE[:, 1 : 1 + experts]  # the rows of the domains that have experts
    right = int((own_NEE.mean(0).argmax(-1) == np.arange(experts)).sum())
    share = intervals.over_seeds(own_NEE.diagonal(axis1=1, axis2=2).mean(-1))
    words = (
        f"{runs.label(arm)}: {right} of {experts} domains; their experts' share of tokens {intervals.text(share)}, "
        f"{1 / experts:.2f} by chance"
    )
    return words, right == experts


def at_start(runs: Runs, where: str) -> list[Evidence]:
    """Measures the new expert's share of the new domain before the extension is trained."""
    chosen_NDE = runs.chosen(start(EXTENDED))
    if chosen_NDE is None:
        return []
    new_NE = chosen_NDE[:, -1]
    share = intervals.over_seeds(new_NE[:, -1])
    largest = new_NE.argmax(-1) == new_NE.shape[-1] - 1
    words = (
        f"share of the new expert {intervals.text(share)}, the largest in {largest.sum()} of "
        f"{len(largest)} seeds"
    )
    for arm in (APPENDED, RESET):
        if (other := runs.chosen(start(arm))) is not None:
            words += f"; {runs.label(arm)} {intervals.text(intervals.over_seeds(other[:, -1, -1]))}"
    return [Evidence(where, words, bool(largest.all()))]


def over_attraction(runs: Runs, where: str) -> list[Evidence]:
    """Measures the new expert's share of the old domains before the extension is trained."""
    if (shares := _attracted(runs, EXTENDED)) is None:
        return []
    old, new = shares
    words = f"over-attraction: {intervals.text(old)} of the old domains' tokens, {intervals.text(new)} of the new one's"
    if (with_z_loss := _attracted(runs, _Z_LOSS)) is not None:
        both = " and ".join(map(intervals.text, with_z_loss))
        words += f"; with a router z-loss of 0.001 before the extension {both}"
    return [Evidence(where, words, old["value"] <= ATTRACTED and old["value"] < new["value"])]


def _attracted(runs: Runs, arm: str) -> list[dict] | None:
    """Returns the new expert's shares of the old domains' tokens and of the new one's at step 0; None without routing."""
    if (chosen_NDE := runs.chosen(start(arm))) is None:
        return None
    taken_ND = chosen_NDE[:, :, -1]
    return [
        intervals.over_seeds(taken_N) for taken_N in (taken_ND[:, :-1].mean(-1), taken_ND[:, -1])
    ]


def _pairs_of(cosines_NEE: np.ndarray) -> np.ndarray:
    """Returns the cosines of different experts, each pair once: [seed, pair]."""
    return cosines_NEE[:, *np.triu_indices(cosines_NEE.shape[-1], 1)]


def similar(runs: Runs, where: str) -> list[Evidence]:
    """Correlates the similarity of experts' vectors with the similarity of their domains."""
    from scipy import stats

    if (cosines := runs.cosines("nexus")) is None or len(cosines[0]) < _LEAST:
        return []
    vectors_NP, projected_NP = map(_pairs_of, cosines[1:])
    rhos_N = [
        float(stats.spearmanr(one, other).statistic)
        for one, other in zip(vectors_NP, projected_NP, strict=True)
    ]
    words = f"rho over {vectors_NP.shape[1]} pairs {intervals.text(intervals.over_seeds(rhos_N))}"
    return [Evidence(where, words, intervals.significant(rhos_N))]


def related(runs: Runs, where: str) -> list[Evidence]:
    """Checks that the two related domains have the most similar experts."""
    cosines = runs.cosines("nexus")
    pair = related_pair(cosines[0]) if cosines is not None else None
    if cosines is None or pair is None:
        return []
    names, _, projected_NEE = cosines
    i, j = pair
    own_N = projected_NEE[:, i, j]
    first_N = own_N >= _pairs_of(projected_NEE).max(-1)
    words = (
        f"{names[i]} and {names[j]}: cosine {intervals.text(intervals.over_seeds(own_N))}, the largest of all pairs in "
        f"{first_N.sum()} of {len(first_N)} seeds"
    )
    return [Evidence(where, words, bool(first_N.all()))]


def related_pair(names: Sequence[str]) -> tuple[int, int] | None:
    """Returns the places of two generated domains of which one has rows of the other's table; None if there are none."""
    from data.nexus import lag_domains

    known = {
        i: lag_domains.DOMAINS[name] for i, name in enumerate(names) if name in lag_domains.DOMAINS
    }
    related = (
        (i, j)
        for j, made in known.items()
        for i, other in known.items()
        if made.related_to == other.table
    )
    return next(related, None)


CLAIMS = (
    RequiredClaim(
        "N1",
        "A mixture with Nexus' router is no worse than one with a linear router",
        "the linear router has not the lower loss on the old domains",
        everywhere(_pairs(("nexus", "linear"), no_worse=True)),
    ),
    RequiredClaim(
        "N2",
        "Both are better than the seed, and the seed is better than the merged experts",
        "Nexus and linear have a lower loss on the old domains than the seed, and it a lower one than merged",
        everywhere(_pairs(("nexus", SEED), ("linear", SEED), (SEED, MERGED))),
    ),
    Claim(
        "N3",
        "Nexus' router is better",
        "Nexus has the lower loss on the old domains",
        everywhere(_pairs(("nexus", "linear"))),
    ),
    RequiredClaim(
        "N4",
        "After an extension Nexus is no worse on the new domain than a linear router that is drawn anew",
        "at no budget has the linear router the lower loss on the new domain",
        everywhere(*_at_budgets((EXTENDED, RESET), no_worse=True)),
    ),
    RequiredClaim(
        "N5",
        "Nexus is better on the new domain before any further training",
        "it has the lower loss on the new domain at step 0",
        everywhere(*_at_budgets((EXTENDED, RESET), steps=[0])),
    ),
    Claim(
        "N6",
        "and at every budget",
        "it has the lower loss on the new domain at each",
        everywhere(*_at_budgets((EXTENDED, RESET))),
    ),
    Claim(
        "N7",
        "The gap is largest at the smallest budget",
        f"the gap in loss on the new domain is larger at {BUDGETS[0]} updates than at each other budget",
        everywhere(shrinking),
    ),
    Claim(
        "N8",
        "Nexus is no worse than a linear router that keeps its rows (a control, not a claim of the paper)",
        "at no budget has the linear router with a row appended the lower loss on the new domain",
        everywhere(*_at_budgets((EXTENDED, APPENDED), steps=(0, *BUDGETS), no_worse=True)),
    ),
    Claim(
        "N9",
        "An extension hardly changes the loss on the old domains",
        f"at each budget the loss on them is at most {FLAT:.0%} above that before the extension, on the mean",
        everywhere(*(functools.partial(flat, step=step) for step in BUDGETS)),
    ),
    Claim(
        "N10",
        "A short extension keeps the old domains better with Nexus than with a linear router",
        f"Nexus has the lower loss on the old domains at {BUDGETS[0]} updates than with rows drawn anew or appended",
        everywhere(_pairs((EXTENDED, RESET), (EXTENDED, APPENDED), step=BUDGETS[0])),
    ),
    Claim(
        "N11",
        "Domains go to the experts that were trained on them",
        "after upcycling, the largest share of each of their domains' tokens goes to its expert, mean over seeds",
        everywhere(diagonal),
    ),
    RequiredClaim(
        "N12",
        "The new domain goes to the new expert before any further training",
        "at step 0 of the extension, the new expert has the largest share of the new domain's tokens, in every seed",
        everywhere(at_start),
    ),
    Claim(
        "N13",
        "The new expert does not attract the old domains (a control, not a claim of the paper)",
        f"at step 0, at most {ATTRACTED:.0%} of the old domains' tokens go to it, and fewer than of the new one's, on the "
        "mean",
        everywhere(over_attraction),
    ),
    RequiredClaim(
        "N14",
        "Similar domains keep similar experts' vectors",
        "cosines of experts' vectors rise with those of their domains (Spearman's rho over pairs, mean over layers, "
        "better than 0); the two related domains are the most similar experts in every seed",
        everywhere(similar, related),
    ),
    Claim(
        "N15",
        "A weak balance loss hurts a linear router",
        "it has a lower loss on the old domains with 0.05 than with 0.0005",
        everywhere(_pairs(("linear", "linear_low"))),
    ),
    Claim(
        "N16",
        "and does not hurt Nexus",
        "it has not a lower loss with 0.05 than with 0.0005",
        everywhere(_pairs(("nexus_low", "nexus"), no_worse=True)),
    ),
    Claim(
        "N17",
        "The content of the embeddings matters (a control, not a claim of the paper)",
        "Nexus has a lower loss than with random or one-hot vectors on the old domains, and than with random ones "
        "on the new domain at step 0 and at the smallest budget",
        everywhere(
            _pairs(("nexus", "nexus_random"), ("nexus", "nexus_one_hot")),
            *_at_budgets((EXTENDED, "ext_random"), steps=(0, BUDGETS[0])),
        ),
    ),
    Claim(
        "N18",
        "Nexus is no worse than a router of as many parameters (a control, not a claim of the paper)",
        "the MLP router has not the lower loss on the old domains",
        everywhere(_pairs(("nexus", "mlp_router"), no_worse=True)),
    ),
    Claim(
        "N19",
        "It is better than the seed trained on as many tokens in all (a control, not a claim of the paper)",
        "Nexus has a lower loss on the old domains than the dense model that was trained on the tokens of all "
        "experts and of the mixture",
        everywhere(_pairs(("nexus", CONTINUED))),
    ),
)
