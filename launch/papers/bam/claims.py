"""The claims of BAM, with what was measured for each.

Arms of the same seed start from the same seed model and specialists, and read the same data in the same order, so
that they are compared in pairs. *Data-matched* arms train on as many tokens as BTX, and BAM computes more;
*compute-matched* ones end when they have computed as much as BTX.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.bam import caches
from launch.papers.bam.arms import BTX, SEED, Runs, matched, specialist
from launch.papers.shared import claim, domain_claims
from launch.papers.shared.claim import Claim, Evidence
from launch.papers.shared.domain_claims import Judge, pairs
from launch.papers.shared.domains import MEAN, PARTS, lower, off, on
from launch.plots import intervals

SAME = 0.02  # of BTX's loss: what counts as about as good, on the mean over seeds
RESCUED = (
    0.5  # of the gap between BTX and BAM on the mean over seeds, that copies of the seed may close
)
ENOUGH = 1500  # updates of a mixture, below which it says little beside dense training
_MODELS = "models"


def claims(found: Mapping[str, Any]) -> list[Claim]:
    """All of them, of what `experiment.run` has found."""
    judge = domain_claims.judge(Runs.parts(found))
    of_models = [_caches(found.get("caches", {}))]
    of_runs = [
        *_specialists(judge),
        *_better_than_btx(judge),
        *_soft_routing(judge),
        *_copies(judge),
    ]
    return [
        *claim.placed(of_runs, {part: part for part in PARTS}),
        *claim.placed(of_models, {"caches": _MODELS}),
        *claim.placed(_controls(judge), {part: part for part in PARTS}),
    ]


def _specialists(judge: Judge) -> list[Claim]:
    def home(results: Runs, where: str) -> list[Evidence]:
        special = results.domains[1:]
        return [
            evidence
            for domain in special
            for other in (SEED, *(specialist(x) for x in special if x != domain))
            for evidence in lower(results, where, specialist(domain), other, on(domain))
        ]

    def elsewhere(results: Runs, where: str) -> list[Evidence]:
        return [
            evidence
            for domain in results.domains[1:]
            for evidence in lower(results, where, SEED, specialist(domain), off(domain))
        ]

    return [
        Claim(
            "B1",
            "A specialist is the best at home",
            "on its domain it has a lower loss than the seed and than each other specialist",
            judge(home),
            required=True,
        ),
        Claim(
            "B2",
            "and worse than the seed elsewhere",
            "the seed has the lower mean loss over the other domains",
            judge(elsewhere),
            required=True,
        ),
    ]


def _better_than_btx(judge: Judge) -> list[Claim]:
    return [
        Claim(
            "B3",
            "Attentions with keys and values of their own are better than with shared ones, and these than BTX",
            "data-matched, BAM has a lower mean loss than shared-KV BAM, and it a lower one than BTX",
            judge(pairs(("bam", "bam_shared_kv"), ("bam_shared_kv", "btx"))),
            required=True,
        ),
        Claim(
            "B4",
            "The same at equal compute",
            "B3, compute-matched",
            judge(
                pairs((matched("bam"), matched("bam_shared_kv")), (matched("bam_shared_kv"), "btx"))
            ),
        ),
        Claim(
            "B5",
            "BAM is ahead of BTX with as many parameters, in all and active",
            "data-matched, a lower mean loss than BTX with 4 and with 6 experts, and with 6 of which 3 are active",
            judge(pairs(*(("bam", other) for other in BTX))),
            required=True,
        ),
        Claim(
            "B6",
            "The same at equal compute",
            "B5, compute-matched",
            judge(pairs(*((matched("bam"), matched(other)) for other in BTX))),
        ),
    ]


def _soft_routing(judge: Judge) -> list[Claim]:
    def order(name: Callable[[str], str]) -> list[Evidence]:
        soft, two, one = map(name, ("bam", "moa_top2", "moa_top1"))
        return judge(pairs((soft, two), (soft, one)), pairs((two, one), no_worse=True))

    def about(name: Callable[[str], str]) -> list[Evidence]:
        return judge(
            *(
                lambda results, where, arm=arm: _same(results, where, name(arm), "btx")
                for arm in _TOP
            )
        )

    return [
        Claim(
            "B7",
            "Soft routing of attentions is better than top-2, and top-2 no worse than top-1",
            "data-matched: soft has a lower mean loss than both, and top-1 not a lower one than top-2",
            order(str),
            required=True,
        ),
        Claim("B8", "The same at equal compute", f"B7, compute-matched; {_ALL}", order(matched)),
        Claim(
            "B9",
            "Attentions that are chosen are about as good as averaged ones, at equal compute",
            f"compute-matched, loss of top-1 and top-2 within {SAME:.0%} of BTX's on the mean; {_ALL}",
            about(matched),
        ),
        Claim(
            "B10",
            "The same at equal data (which the paper does not say)",
            f"data-matched, loss of top-1 and top-2 within {SAME:.0%} of BTX's on the mean",
            about(str),
        ),
    ]


_TOP = ("moa_top2", "moa_top1")
_ALL = "attentions that are not chosen are computed too, so that all three make the same number of updates"


def _same(results: Runs, where: str, one: str, other: str) -> list[Evidence]:
    ones, others = results.paired(MEAN, one, other)
    if not len(ones):
        return []
    change = intervals.over_seeds(100 * (ones - others) / others)
    words = f"{MEAN}: {results.label(one)} differs from {results.label(other)} by {intervals.text(change)} %"
    return [Evidence(where, words, abs(change["value"]) <= 100 * SAME)]


def _copies(judge: Judge) -> list[Claim]:
    def rescue(results: Runs, where: str) -> list[Evidence]:
        _, btx, bam = results.paired(MEAN, "btx6", "btx", "bam")
        if not len(btx):
            return []
        closed = gap_closed(results, "btx6")
        if closed is None:
            gap = intervals.text(intervals.over_seeds(btx - bam), 3)
            return [Evidence(where, f"no gap to close: BTX less BAM is {gap}", False)]
        words = f"{results.label('btx6')} closes {intervals.text(closed)} of the gap between BTX and BAM"
        return [Evidence(where, words, closed["value"] <= RESCUED)]

    return [
        Claim(
            "B11",
            "More experts that are copies of the seed do not rescue BTX",
            f"data-matched, two of them, one expert being chosen as before, close at most {RESCUED:.0%} of its gap in loss to "
            "BAM, on the mean",
            judge(rescue),
            required=True,
        )
    ]


def gap_closed(results: Runs, arm: str) -> dict[str, float] | None:
    """Share of BTX's distance to BAM in mean loss by which an arm is better than BTX, over seeds.

    Of the means, with an interval over seeds of the arm's gain alone: a share of a gap that is near zero in one
    seed says nothing. None where there is no gap, or no such arm.
    """
    arms, btx, bam = results.paired(MEAN, arm, "btx", "bam")
    if not len(arms) or (gap := float(np.mean(btx - bam))) <= 0:
        return None
    return intervals.over_seeds((btx - arms) / gap)


def _caches(found: Mapping[str, Sequence[int]]) -> Claim:
    evidence = []
    for kind, times in (("shared_kv", 1), ("expert_kv", None)):
        for n, dense, held in zip(
            found.get("experts", ()), found.get("dense", ()), found.get(kind, ()), strict=True
        ):
            expected = n if times is None else times
            words = f"{caches.NAMES[kind]}, {n} experts: {held:,} bytes, a dense model {dense:,}"
            evidence.append(Evidence(_MODELS, words, held == expected * dense))
    return Claim(
        "B12",
        "With shared keys and values the cache is a dense model's; with own ones it is as many times larger as "
        "there are experts",
        f"bytes of keys and values of {caches.LENGTH} tokens are equal, or N times as many",
        evidence,
        required=True,
    )


def _controls(judge: Judge) -> list[Claim]:
    def capacity(results: Runs, where: str) -> list[Evidence]:
        out = lower(results, where, "bam", "bam_averaged")
        if out and (closed := gap_closed(results, "bam_averaged")) is not None:
            (one,) = out
            words = f"{one.measured}; copies of the average make {intervals.text(closed)} of BAM's gain over BTX"
            return [Evidence(one.where, words, one.holds)]
        return out

    return [
        Claim(
            "B13",
            "The gain is more than that of larger attention (a control, not a claim of the paper)",
            "BAM has a lower mean loss than with attention experts that are copies of the averaged attention, "
            "data-matched and compute-matched",
            judge(capacity, pairs((matched("bam"), matched("bam_averaged")))),
        ),
        Claim(
            "B14",
            "Mixtures are better than the seed trained on as many tokens in all (a control, not a claim of the paper)",
            "BAM and BTX have a lower mean loss than the dense model that was trained on the tokens of all "
            f"specialists and of the mixture; fewer than {ENOUGH:,} updates of the mixture allow no conclusion",
            judge(_beside_dense),
        ),
        Claim(
            "B15",
            "and better than a soup of the same models (a control, not a claim of the paper)",
            "BAM and BTX have a lower mean loss than the average of all weights",
            judge(pairs(("bam", "soup"), ("btx", "soup"))),
        ),
    ]


def _beside_dense(results: Runs, where: str) -> list[Evidence]:
    out = []
    for arm in ("bam", "btx"):
        steps = min((row["step"] for row in results.find(arm).values()), default=0)
        few = f", fewer than {ENOUGH:,}" if steps < ENOUGH else ""
        place = f"{where}, {steps:,} updates of the mixture{few}"
        out += lower(results, place, arm, "dense_continued")
    return out
