"""The claims of Nexus on losses, with what was measured for each; those on routers are in router_claims.py.

Arms of the same seed share the seed model, the experts and the data with their order, so that they are compared in
pairs. Before the extension losses are means over the general domain and those of the experts; after it the new domain
stands by itself.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.nexus import router_claims
from launch.papers.nexus.arms import BUDGETS, CONTINUED, MERGED, NEW, OLD, SEED, Runs
from launch.papers.shared import claim, domain_claims
from launch.papers.shared.claim import Claim, Evidence
from launch.papers.shared.domain_claims import Judge
from launch.papers.shared.domains import PARTS
from launch.plots import intervals

FLAT = 0.02  # of the loss on the old domains: what an extension may cost, on the mean over seeds
RESET, APPENDED, EXTENDED = "ext_linear_reset", "ext_linear_append", "ext_nexus"


def claims(found: Mapping[str, Any]) -> list[Claim]:
    """All of them, of what `experiment.run` has found."""
    judge = domain_claims.judge(Runs.parts(found))
    judged = [
        *_upcycled(judge),
        *_extended(judge),
        *_old_domains(judge),
        *router_claims.claims(judge),
        *_balance(judge),
        *_controls(judge),
    ]
    return claim.placed(judged, {part: part for part in PARTS})


_pairs = functools.partial(domain_claims.pairs, score=OLD)


def _upcycled(judge: Judge) -> list[Claim]:
    return [
        Claim(
            "N1",
            "A mixture with Nexus' router is no worse than one with a linear router",
            "the linear router has not the lower loss on the old domains",
            judge(_pairs(("nexus", "linear"), no_worse=True)),
            required=True,
        ),
        Claim(
            "N2",
            "Both are better than the seed, and the seed is better than the merged experts",
            "Nexus and linear have a lower loss on the old domains than the seed, and it a lower one than merged",
            judge(_pairs(("nexus", SEED), ("linear", SEED), (SEED, MERGED))),
            required=True,
        ),
        Claim(
            "N3",
            "Nexus' router is better",
            "Nexus has the lower loss on the old domains",
            judge(_pairs(("nexus", "linear"))),
        ),
    ]


def _extended(judge: Judge) -> list[Claim]:
    pair = (EXTENDED, RESET)
    return [
        Claim(
            "N4",
            "After an extension Nexus is no worse on the new domain than a linear router that is drawn anew",
            "at no budget has the linear router the lower loss on the new domain",
            judge(*(_pairs(pair, score=NEW, step=step, no_worse=True) for step in BUDGETS)),
            required=True,
        ),
        Claim(
            "N5",
            "Nexus is better on the new domain before any further training",
            "it has the lower loss on the new domain at step 0",
            judge(_pairs(pair, score=NEW, step=0)),
            required=True,
        ),
        Claim(
            "N6",
            "and at every budget",
            "it has the lower loss on the new domain at each",
            judge(*(_pairs(pair, score=NEW, step=step) for step in BUDGETS)),
        ),
        Claim(
            "N7",
            "The gap is largest at the smallest budget",
            f"the gap in loss on the new domain is larger at {BUDGETS[0]} updates than at each other budget",
            judge(_shrinking),
        ),
        Claim(
            "N8",
            "Nexus is no worse than a linear router that keeps its rows (a control, not a claim of the paper)",
            "at no budget has the linear router with a row appended the lower loss on the new domain",
            judge(
                *(
                    _pairs((EXTENDED, APPENDED), score=NEW, step=step, no_worse=True)
                    for step in (0, *BUDGETS)
                )
            ),
        ),
    ]


def _shrinking(results: Runs, where: str) -> list[Evidence]:
    by_step = {}
    for step in BUDGETS:
        at = results.at(step)
        nexus, linear = (at.scores(arm, NEW) for arm in (EXTENDED, RESET))
        by_step[step] = {seed: linear[seed] - nexus[seed] for seed in nexus if seed in linear}
    first, *later = BUDGETS
    out = []
    for step in later:
        seeds = sorted(set(by_step[first]) & set(by_step[step]))
        if not seeds:
            continue
        gaps = {s: [by_step[s][seed] for seed in seeds] for s in (first, step)}
        shrunk = [a - b for a, b in zip(gaps[first], gaps[step], strict=True)]
        words = "; ".join(
            f"gap at {s} updates {intervals.text(intervals.over_seeds(gaps[s]), 3)}" for s in gaps
        )
        out.append(Evidence(where, words, intervals.significant(shrunk)))
    return out


def _old_domains(judge: Judge) -> list[Claim]:
    first = BUDGETS[0]
    return [
        Claim(
            "N9",
            "An extension hardly changes the loss on the old domains",
            f"at each budget the loss on them is at most {FLAT:.0%} above that before the extension, on the mean",
            judge(*(functools.partial(_flat, step=step) for step in BUDGETS)),
        ),
        Claim(
            "N10",
            "A short extension keeps the old domains better with Nexus than with a linear router",
            f"Nexus has the lower loss on the old domains at {first} updates than with rows drawn anew or appended",
            judge(_pairs((EXTENDED, RESET), (EXTENDED, APPENDED), score=OLD, step=first)),
        ),
    ]


def _flat(results: Runs, where: str, *, step: int) -> list[Evidence]:
    ends, starts = results.at(step).scores(EXTENDED, OLD), results.scores("nexus", OLD)
    seeds = sorted(set(ends) & set(starts))
    if not seeds:
        return []
    after, before = (np.array([one[seed] for seed in seeds]) for one in (ends, starts))
    change = intervals.over_seeds(100 * (after - before) / before)
    words = (
        f"{OLD}: before {results.mean(before, OLD)}, after {results.mean(after, OLD)}; change "
        f"{intervals.text(change, 1)} %"
    )
    return [Evidence(f"{where}, {step} updates", words, change["value"] <= 100 * FLAT)]


def _balance(judge: Judge) -> list[Claim]:
    return [
        Claim(
            "N15",
            "A weak balance loss hurts a linear router",
            "it has a lower loss on the old domains with 0.05 than with 0.0005",
            judge(_pairs(("linear", "linear_low"))),
        ),
        Claim(
            "N16",
            "and does not hurt Nexus",
            "it has not a lower loss with 0.05 than with 0.0005",
            judge(_pairs(("nexus_low", "nexus"), no_worse=True)),
        ),
    ]


def _controls(judge: Judge) -> list[Claim]:
    return [
        Claim(
            "N17",
            "What the embeddings say matters (a control, not a claim of the paper)",
            "Nexus has a lower loss than with random or one-hot vectors on the old domains, and than with random ones "
            "on the new domain at step 0 and at the smallest budget",
            judge(
                _pairs(("nexus", "nexus_random"), ("nexus", "nexus_one_hot")),
                *(
                    _pairs((EXTENDED, "ext_random"), score=NEW, step=step)
                    for step in (0, BUDGETS[0])
                ),
            ),
        ),
        Claim(
            "N18",
            "Nexus is no worse than a router of as many parameters (a control, not a claim of the paper)",
            "the MLP router has not the lower loss on the old domains",
            judge(_pairs(("nexus", "mlp_router"), no_worse=True)),
        ),
        Claim(
            "N19",
            "It is better than the seed trained on as many tokens in all (a control, not a claim of the paper)",
            "Nexus has a lower loss on the old domains than the dense model that was trained on the tokens of all "
            "experts and of the mixture",
            judge(_pairs(("nexus", CONTINUED))),
        ),
    ]
