"""The claims of low-rank training and how each is measured, on language (L) and on images (V).

Arms of the same seed share their data, their order and the part of their initialisation that does not depend on the
arm, so that they are compared in pairs.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from launch.papers.low_rank import sweep as lm
from launch.papers.low_rank import timing
from launch.papers.low_rank import vision_sweep as vision
from launch.papers.low_rank.arms import Results, arm_name
from launch.papers.shared import results
from launch.papers.shared.claim import Claim, Evidence, Measure, RequiredClaim
from launch.papers.shared.results import compare
from launch.plots import intervals

SAME = 0.05  # of spectral's perplexity: how much the singular values of the start may change it
CLOSE = 0.02  # of accuracy: the gap to dense that may remain
GRID = tuple((kind, weight) for kind in lm.DECAYS for weight in lm.WEIGHTS)
_PERPLEXITY = "perplexity"
_SMALLER = [rank for rank in lm.RANKS if rank != lm.MAIN]
_DRAWN = lm.INITS[1:]
_DECAYS = [
    (lm.decayed("frobenius", rate, weight), lm.decayed("l2", rate, weight))
    for weight, rate in itertools.product(lm.WEIGHTS, lm.RATES)
]
_WARM = (("warm_start", "spectral"), ("warm_start_ratio", "spectral_ratio"))
_IMAGE_DECAYS = [
    (vision.arm(init, "frobenius", rate), vision.arm(init, "l2", rate))
    for init, rate in itertools.product(vision.INITS, vision.RATES)
]
_HALVED = [
    (lm.decayed(kind, "half", weight), lm.decayed(kind, "full", weight))
    for kind, weight in (("none", ""), *GRID)
]
_SMALLER_RANKS = [
    pair
    for rank in _SMALLER
    for pair in (
        *(("dense", lm.arm(init, rank)) for init in lm.INITS),
        *((lm.arm(init, rank), lm.arm("he", rank)) for init in _DRAWN),
    )
]


def same(runs: Results, where: str) -> list[Evidence]:
    """Compares spectral ones with spectral at every rank, within a tolerance."""
    out = []
    for rank in lm.RANKS:
        arms = lm.arm("spectral_ones", rank), lm.arm("spectral", rank)
        ones, spectral = runs.paired(_PERPLEXITY, *arms)
        if len(ones):
            change = results.change(ones, spectral)
            differs = f"differs from spectral by {intervals.text(change, 1)} %"
            words = f"rank {rank}: spectral ones {differs}"
            out.append(Evidence(where, words, abs(change["value"]) <= 100 * SAME))
    return out


def order(runs: Results, where: str) -> list[Evidence]:
    """Correlates effective step and perplexity over the decays of a learning rate."""
    from scipy import stats

    out = []
    for rate in lm.RATES:
        arms = [lm.decayed(kind, rate, weight) for kind, weight in GRID]
        steps_AN, scores_AN = (
            np.array(runs.paired(name, *arms)) for name in ("effective_step", _PERPLEXITY)
        )
        if runs.has(*arms) and steps_AN.size:
            pairs = zip(steps_AN.T, scores_AN.T, strict=True)
            taus_N = np.array([stats.kendalltau(*pair).statistic for pair in pairs])
            words = (
                f"{rate} rate, {len(arms)} decays: tau of effective step and perplexity "
                f"{intervals.text(intervals.over_seeds(taus_N))}"
            )
            out.append(Evidence(where, words, not intervals.significant(-taus_N)))
    return out


def winners(cause: str, holds: Callable[[float], bool]) -> Measure:
    """Returns a measure of how often the one of two decays with more of `cause` has the better perplexity, by rate."""

    def measure(runs: Results, where: str) -> list[Evidence]:
        out = []
        for rate in lm.RATES:
            won: list[bool] = []
            for weight in lm.WEIGHTS:
                arms = [lm.decayed(kind, rate, weight) for kind in lm.DECAYS]
                causes, scores = (runs.paired(name, *arms) for name in (cause, _PERPLEXITY))
                if len(causes[0]) and len(causes[0]) == len(scores[0]):
                    won += ((causes[0] > causes[1]) == (scores[0] < scores[1])).tolist()
            if won:
                words = f"{rate} rate: the larger {arm_name(cause)} wins in {sum(won)} of {len(won)} pairs"
                out.append(Evidence(where, words, holds(float(np.mean(won)))))
        return out

    return measure


def times(measured: Mapping[str, Any], where: str) -> list[Evidence]:
    """Compares the time of a step with the dense model's at every rank."""
    out = []
    for rank in lm.RANKS:
        ratios = timing.ratios(measured, lm.arm("spectral", rank))
        ratio = intervals.over_seeds(ratios)
        words = (
            f"rank {rank}: a step takes {intervals.text(ratio)} of the dense step's time, "
            f"{len(ratios)} rounds in turns"
        )
        out.append(Evidence(where, words, ratio["high"] < 1))
    return out


def close(runs: Results, where: str) -> list[Evidence]:
    """Compares the accuracy of spectral starts on images with dense, within a tolerance."""
    out = []
    for init in vision.INITS[1:]:
        ones, dense = runs.paired("accuracy", vision.arm(init), "dense")
        if len(ones):
            gap = intervals.over_seeds(ones - dense)
            words = (
                f"accuracy: {arm_name(init)} {runs.mean(ones, 'accuracy')}, dense "
                f"{runs.mean(dense, 'accuracy')}; difference {intervals.text(gap, 3)}"
            )
            out.append(Evidence(where, words, gap["value"] >= -CLOSE))
    return out


def halved(runs: Results, where: str) -> list[Evidence]:
    """Compares half the learning rate with the full one on images, by accuracy and effective step."""
    out = []
    for init, kind in itertools.product(vision.INITS, vision.DECAYS):
        half, full = (vision.arm(init, kind, rate) for rate in ("half", "full"))
        judged = runs.better(where, "accuracy", half, full, no_worse=True)
        out += judged
        steps = runs.paired("effective_step", half, full)
        if judged and len(steps[0]):
            ratio = intervals.over_seeds(steps[0] / steps[1])
            words = f"effective step of {arm_name(half)} over full {intervals.text(ratio)}"
            out.append(Evidence(where, words, ratio["value"] < 1))
    return out


CLAIMS = (
    RequiredClaim(
        "L1",
        "No model that is factorised from the start reaches the dense one",
        f"dense has the better perplexity than each start, at rank {lm.MAIN} of the smaller side",
        {"lm": [compare(_PERPLEXITY, *(("dense", lm.arm(init)) for init in lm.INITS))]},
    ),
    RequiredClaim(
        "L2",
        "Starting from the directions of a dense draw is better than from independent factors",
        f"spectral and spectral ones have the better perplexity than He, at rank {lm.MAIN}",
        {"lm": [compare(_PERPLEXITY, *((lm.arm(init), lm.arm("he")) for init in _DRAWN))]},
    ),
    RequiredClaim(
        "L3",
        "The singular values of the start hardly matter",
        f"mean perplexity of spectral ones within {SAME:.0%} of spectral's, at every rank",
        {"lm": [same]},
    ),
    Claim(
        "L4",
        "The same at smaller ranks",
        "L1 and L2, at " + " and ".join(map(str, _SMALLER)),
        {"lm": [compare(_PERPLEXITY, *_SMALLER_RANKS)]},
    ),
    RequiredClaim(
        "L5",
        "Decay of the product is better than decay of the factors",
        "Frobenius decay has the better perplexity at every lambda and learning rate",
        {"lm": [compare(_PERPLEXITY, *_DECAYS)]},
    ),
    RequiredClaim(
        "L6",
        "Decay of the product keeps the effective rank higher than decay of the factors",
        "a higher mean effective rank at the end, at every lambda and learning rate",
        {"lm": [compare("effective_rank", *_DECAYS)]},
    ),
    RequiredClaim(
        "L7",
        "The effective step does not predict which run is better",
        "over the decayed runs of a learning rate, Kendall's tau of effective step and perplexity is not "
        "significantly negative; of pairs of L2 and Frobenius decay at one lambda, the larger step wins half at "
        "most",
        {"lm": [order, winners("effective_step", lambda share: share <= 0.5)]},
    ),
    Claim(
        "L8",
        "The effective rank predicts which decay is better",
        "of pairs of L2 and Frobenius decay at one lambda, the higher rank wins more than half",
        {"lm": [winners("effective_rank", lambda share: share > 0.5)]},
    ),
    Claim(
        "L9",
        "Half the learning rate, and so a smaller effective step, does not hurt",
        "the full rate has not the better perplexity, without decay and with each",
        {"lm": [compare(_PERPLEXITY, *_HALVED, no_worse=True)]},
    ),
    RequiredClaim(
        "L10",
        "Some dense updates before factorising are no worse than factors from the start",
        "spectral has not the better perplexity after as many updates in all, with ranks by either rule",
        {"lm": [compare(_PERPLEXITY, *_WARM, no_worse=True)]},
    ),
    Claim(
        "L11",
        "They are better",
        "the warm start has the better perplexity",
        {"lm": [compare(_PERPLEXITY, *_WARM)]},
    ),
    Claim(
        "L12",
        "Factors are better than a narrower dense model of as many parameters (not a claim of the paper)",
        "spectral has the better perplexity at every rank",
        {
            "lm": [
                compare(
                    _PERPLEXITY, *((lm.arm("spectral", rank), lm.narrow(rank)) for rank in lm.RANKS)
                )
            ]
        },
    ),
    Claim(
        "L13",
        "Factors make a step faster",
        "less than the dense step's time at every rank, with the interval over rounds",
        {"timing": [times]},
    ),
    RequiredClaim(
        "V1",
        "On images factors close the gap to the dense network",
        f"mean accuracy of spectral and spectral ones at most {CLOSE} below dense",
        {"vision": [close]},
    ),
    Claim(
        "V2",
        "Decay of the product costs no accuracy beside decay of the factors",
        "L2 has not the better accuracy, for every start and learning rate",
        {"vision": [compare("accuracy", *_IMAGE_DECAYS, no_worse=True)]},
    ),
    Claim(
        "V3",
        "On images too decay of the product keeps the effective rank higher than decay of the factors",
        "a higher mean effective rank at the end, for every start and learning rate",
        {"vision": [compare("effective_rank", *_IMAGE_DECAYS)]},
    ),
    Claim(
        "V4",
        "Half the learning rate does not hurt, although the effective step falls",
        "the full rate has not the better accuracy, and has the larger effective step",
        {"vision": [halved]},
    ),
)
