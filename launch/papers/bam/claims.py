"""The claims of BAM and how each is measured.

Arms of the same seed start from the same seed model and specialists, and read the same data in the same order, so
that they are compared in pairs. *Data-matched* arms train on as many tokens as BTX, and BAM computes more;
*compute-matched* ones end when they have computed as much as BTX.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from launch.papers.bam.arms import BTX, CACHES, SEED, Runs, matched, specialist
from launch.papers.bam.measure import CACHE_LENGTH
from launch.papers.shared import results
from launch.papers.shared.claim import Claim, Evidence, Measure, RequiredClaim
from launch.papers.shared.domains import MEAN, everywhere, off, on, pairs
from launch.plots import intervals

SAME = 0.02  # of BTX's loss: what counts as about as good, on the mean over seeds
RESCUED = 0.5  # of the mean gap between BTX and BAM, that copies of the seed may close
ENOUGH = 1500  # updates of a mixture; fewer allow no conclusion against dense training
PLACES = {"caches": "models"}
_TOP = ("moa_top2", "moa_top1")
_ALL = "attentions that are not chosen are computed too, so that all three make the same number of updates"


def home(runs: Runs, where: str) -> list[Evidence]:
    """Compares each specialist with the seed and the other specialists on its own domain."""
    special = runs.domains[1:]
    return [
        evidence
        for domain in special
        for other in (SEED, *(specialist(x) for x in special if x != domain))
        for evidence in runs.better(where, on(domain), specialist(domain), other)
    ]


def elsewhere(runs: Runs, where: str) -> list[Evidence]:
    """Compares the seed with each specialist on the other domains."""
    return [
        evidence
        for domain in runs.domains[1:]
        for evidence in runs.better(where, off(domain), SEED, specialist(domain))
    ]


def order(name: Callable[[str], str]) -> Sequence[Measure]:
    """Compares soft routing of attentions with top-2, and top-2 with top-1."""
    soft, two, one = map(name, ("bam", "moa_top2", "moa_top1"))
    return pairs((soft, two), (soft, one)), pairs((two, one), no_worse=True)


def about(arm: str) -> Measure:
    """Compares an arm with BTX within a tolerance."""

    def measure(runs: Runs, where: str) -> list[Evidence]:
        ones, btx = runs.paired(MEAN, arm, "btx")
        if not len(ones):
            return []
        change = results.change(ones, btx)
        words = f"{MEAN}: {runs.label(arm)} differs from {runs.label('btx')} by {intervals.text(change)} %"
        return [Evidence(where, words, abs(change["value"]) <= 100 * SAME)]

    return measure


def rescue(runs: Runs, where: str) -> list[Evidence]:
    """Measures how much of BAM's gain over BTX two more copies of the seed bring."""
    _, btx, bam = runs.paired(MEAN, "btx6", "btx", "bam")
    if not len(btx):
        return []
    closed = gap_closed(runs, "btx6")
    if closed is None:
        gap = intervals.text(intervals.over_seeds(btx - bam), 3)
        return [Evidence(where, f"no gap to close: BTX less BAM is {gap}", False)]
    words = f"{runs.label('btx6')} closes {intervals.text(closed)} of the gap between BTX and BAM"
    return [Evidence(where, words, closed["value"] <= RESCUED)]


def gap_closed(runs: Runs, arm: str) -> dict[str, float] | None:
    """Returns an arm's gain over BTX in mean loss as a share of BAM's mean gain, with an interval over seeds.

    The interval is of the arm's gain alone: a share of a gap that is near zero in one seed is meaningless. None if
    there is no gap, or no such arm.
    """
    arms, btx, bam = runs.paired(MEAN, arm, "btx", "bam")
    if not len(arms) or (gap := float(np.mean(btx - bam))) <= 0:
        return None
    return intervals.over_seeds((btx - arms) / gap)


def caches(measured: Mapping[str, Sequence[int]], where: str) -> list[Evidence]:
    """Compares the bytes of caches with a dense model's."""
    return [
        Evidence(
            where,
            f"{CACHES[kind]}, {n} experts: {size:,} bytes, a dense model {dense:,}",
            size == (n if kind == "expert_kv" else 1) * dense,
        )
        for kind in ("shared_kv", "expert_kv")
        for n, dense, size in zip(
            measured["experts"], measured["dense"], measured[kind], strict=True
        )
    ]


def capacity(runs: Runs, where: str) -> list[Evidence]:
    """Compares BAM with attention experts that are copies of the averaged attention."""
    closed = gap_closed(runs, "bam_averaged")
    words = ""
    if closed is not None:
        words = f"; copies of the average make {intervals.text(closed)} of BAM's gain over BTX"
    return [
        dataclasses.replace(one, measured=one.measured + words)
        for one in runs.better(where, MEAN, "bam", "bam_averaged")
    ]


def beside_dense(runs: Runs, where: str) -> list[Evidence]:
    """Compares mixtures with the seed trained on all tokens."""
    out = []
    for arm in ("bam", "btx"):
        steps = min((row["step"] for row in runs.find(arm).values()), default=0)
        few = f", fewer than {ENOUGH:,}" if steps < ENOUGH else ""
        place = f"{where}, {steps:,} updates of the mixture{few}"
        out += runs.better(place, MEAN, arm, "dense_continued")
    return out


CLAIMS = (
    RequiredClaim(
        "B1",
        "A specialist is the best at home",
        "on its domain it has a lower loss than the seed and than each other specialist",
        everywhere(home),
    ),
    RequiredClaim(
        "B2",
        "and worse than the seed elsewhere",
        "the seed has the lower mean loss over the other domains",
        everywhere(elsewhere),
    ),
    RequiredClaim(
        "B3",
        "Attentions with keys and values of their own are better than with shared ones, and these than BTX",
        "data-matched, BAM has a lower mean loss than shared-KV BAM, and it a lower one than BTX",
        everywhere(pairs(("bam", "bam_shared_kv"), ("bam_shared_kv", "btx"))),
    ),
    Claim(
        "B4",
        "The same at equal compute",
        "B3, compute-matched",
        everywhere(
            pairs((matched("bam"), matched("bam_shared_kv")), (matched("bam_shared_kv"), "btx"))
        ),
    ),
    RequiredClaim(
        "B5",
        "BAM is ahead of BTX with as many parameters, in all and active",
        "data-matched, a lower mean loss than BTX with 4 and with 6 experts, and with 6 of which 3 are active",
        everywhere(pairs(*(("bam", other) for other in BTX))),
    ),
    Claim(
        "B6",
        "The same at equal compute",
        "B5, compute-matched",
        everywhere(pairs(*((matched("bam"), matched(other)) for other in BTX))),
    ),
    RequiredClaim(
        "B7",
        "Soft routing of attentions is better than top-2, and top-2 no worse than top-1",
        "data-matched: soft has a lower mean loss than both, and top-1 not a lower one than top-2",
        everywhere(*order(str)),
    ),
    Claim(
        "B8",
        "The same at equal compute",
        f"B7, compute-matched; {_ALL}",
        everywhere(*order(matched)),
    ),
    Claim(
        "B9",
        "Attentions that are chosen are about as good as averaged ones, at equal compute",
        f"compute-matched, loss of top-1 and top-2 within {SAME:.0%} of BTX's on the mean; {_ALL}",
        everywhere(*(about(matched(arm)) for arm in _TOP)),
    ),
    Claim(
        "B10",
        "The same at equal data (not a claim of the paper)",
        f"data-matched, loss of top-1 and top-2 within {SAME:.0%} of BTX's on the mean",
        everywhere(*map(about, _TOP)),
    ),
    RequiredClaim(
        "B11",
        "More experts that are copies of the seed do not rescue BTX",
        f"data-matched, two of them, one expert being chosen as before, close at most {RESCUED:.0%} of its gap in loss to "
        "BAM, on the mean",
        everywhere(rescue),
    ),
    RequiredClaim(
        "B12",
        "With shared keys and values the cache is a dense model's; with own ones it is as many times larger as "
        "there are experts",
        f"bytes of keys and values of {CACHE_LENGTH} tokens are equal, or N times as many",
        {"caches": [caches]},
    ),
    Claim(
        "B13",
        "The gain is more than that of larger attention (a control, not a claim of the paper)",
        "BAM has a lower mean loss than with attention experts that are copies of the averaged attention, "
        "data-matched and compute-matched",
        everywhere(capacity, pairs((matched("bam"), matched("bam_averaged")))),
    ),
    Claim(
        "B14",
        "Mixtures are better than the seed trained on as many tokens in all (a control, not a claim of the paper)",
        "BAM and BTX have a lower mean loss than the dense model that was trained on the tokens of all "
        f"specialists and of the mixture; fewer than {ENOUGH:,} updates of the mixture allow no conclusion",
        everywhere(beside_dense),
    ),
    Claim(
        "B15",
        "and better than a soup of the same models (a control, not a claim of the paper)",
        "BAM and BTX have a lower mean loss than the average of all weights",
        everywhere(pairs(("bam", "soup"), ("btx", "soup"))),
    ),
)
