"""The claims of low-rank training on language, with what was measured for each.

Arms of the same seed share their data, their order and what does not depend on the arm of their first values, so
that they are compared in pairs. Those on images are in image_claims.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.low_rank import image_claims, timing
from launch.papers.low_rank import sweep as lm
from launch.papers.shared import claim
from launch.papers.shared.claim import Claim, Evidence
from launch.papers.shared.low_rank_results import Results
from launch.papers.shared.results import better
from launch.plots import intervals

WHERE, STEPS = "characters", "steps"
SAME = 0.05  # of spectral's perplexity: what the singular values may make of it
GRID = tuple((kind, weight) for kind in lm.DECAYS for weight in lm.WEIGHTS)
_PERPLEXITY = "perplexity"


def claims(found: Mapping[str, Any]) -> list[Claim]:
    """All of them, of what `experiment.run` has found."""
    results = Results(found.get("lm", ()))
    language = [
        *_first_values(results),
        *_decay(results),
        *_explanations(results),
        *_warm_start(results),
        _sizes(results),
    ]
    images = image_claims.claims(Results(found.get("vision", ())))
    return [
        *claim.placed(language, {"lm": WHERE}),
        *claim.placed([_times(found.get("timing", {}))], {"timing": STEPS}),
        *claim.placed(images, {"vision": image_claims.WHERE}),
    ]


def _better(results: Results, one: str, other: str, *, no_worse: bool = False) -> list[Evidence]:
    return better(results, WHERE, _PERPLEXITY, one, other, lower=True, no_worse=no_worse)


def _first_values(results: Results) -> list[Claim]:
    drawn = lm.INITS[1:]
    smaller = [rank for rank in lm.RANKS if rank != lm.MAIN]
    return [
        Claim(
            "L1",
            "No model that is factorised from the start reaches the dense one",
            f"dense has the better perplexity than each start, at rank {lm.MAIN} of the smaller side",
            [e for init in lm.INITS for e in _better(results, "dense", lm.arm(init))],
            required=True,
        ),
        Claim(
            "L2",
            "Starting from the directions of a dense draw is better than from independent factors",
            f"spectral and spectral ones have the better perplexity than He, at rank {lm.MAIN}",
            [e for init in drawn for e in _better(results, lm.arm(init), lm.arm("he"))],
            required=True,
        ),
        Claim(
            "L3",
            "The singular values of the start hardly matter",
            f"mean perplexity of spectral ones within {SAME:.0%} of spectral's, at every rank",
            [e for rank in lm.RANKS for e in _same(results, rank)],
            required=True,
        ),
        Claim(
            "L4",
            "The same at smaller ranks",
            "L1 and L2, at " + " and ".join(map(str, smaller)),
            [
                evidence
                for rank in smaller
                for pairs in (
                    [("dense", lm.arm(init, rank)) for init in lm.INITS],
                    [(lm.arm(init, rank), lm.arm("he", rank)) for init in drawn],
                )
                for one, other in pairs
                for evidence in _better(results, one, other)
            ],
        ),
    ]


def _same(results: Results, rank: float) -> list[Evidence]:
    ones, spectral = results.paired(
        _PERPLEXITY, lm.arm("spectral_ones", rank), lm.arm("spectral", rank)
    )
    if not len(ones):
        return []
    change = intervals.over_seeds(100 * (ones - spectral) / spectral)
    words = f"rank {rank}: spectral ones differs from spectral by {intervals.text(change, 1)} %"
    return [Evidence(WHERE, words, abs(change["value"]) <= 100 * SAME)]


def _decay(results: Results) -> list[Claim]:
    pairs = [
        (lm.decayed("frobenius", rate, weight), lm.decayed("l2", rate, weight))
        for weight in lm.WEIGHTS
        for rate in lm.RATES
    ]
    return [
        Claim(
            "L5",
            "Decay of the product is better than decay of the factors",
            "Frobenius decay has the better perplexity at every lambda and learning rate",
            [e for pair in pairs for e in _better(results, *pair)],
            required=True,
        ),
        Claim(
            "L6",
            "Decay of the product keeps the effective rank higher than decay of the factors",
            "a higher mean effective rank at the end, at every lambda and learning rate",
            [e for pair in pairs for e in better(results, WHERE, "effective_rank", *pair)],
            required=True,
        ),
    ]


def _explanations(results: Results) -> list[Claim]:
    return [
        Claim(
            "L7",
            "The effective step does not say which run is better",
            "over the decayed runs of a learning rate, Kendall's tau of effective step and perplexity is not "
            "significantly negative; of pairs of L2 and Frobenius decay at one lambda, the larger step wins half at "
            "most",
            [*_order(results, "effective_step"), *_winners(results, "effective_step", wins=False)],
            required=True,
        ),
        Claim(
            "L8",
            "The effective rank says which decay is better",
            "of pairs of L2 and Frobenius decay at one lambda, the higher rank wins more than half",
            _winners(results, "effective_rank", wins=True),
        ),
        Claim(
            "L9",
            "Half the learning rate, and so a smaller effective step, does not hurt",
            "the full rate has not the better perplexity, without decay and with each",
            [
                evidence
                for kind, weight in (("none", ""), *GRID)
                for evidence in _better(
                    results,
                    lm.decayed(kind, "half", weight),
                    lm.decayed(kind, "full", weight),
                    no_worse=True,
                )
            ],
        ),
    ]


def _order(results: Results, cause: str) -> list[Evidence]:
    """Whether more of it goes with a better perplexity, over the decays of a learning rate."""
    from scipy import stats

    out = []
    for rate in lm.RATES:
        arms = [lm.decayed(kind, rate, weight) for kind, weight in GRID]
        if not results.has(*arms):
            continue
        causes_AN, scores_AN = (
            np.array(results.paired(name, *arms)) for name in (cause, _PERPLEXITY)
        )
        if not causes_AN.size:
            continue
        taus_N = np.array(
            [
                stats.kendalltau(one, other).statistic
                for one, other in zip(causes_AN.T, scores_AN.T, strict=True)
            ]
        )
        words = (
            f"{rate} rate, {len(arms)} decays: tau of {_name(cause)} and perplexity "
            f"{intervals.text(intervals.over_seeds(taus_N))}"
        )
        out.append(Evidence(WHERE, words, not intervals.significant(-taus_N)))
    return out


def _winners(results: Results, cause: str, *, wins: bool) -> list[Evidence]:
    """How often the one of two decays with more of it has the better perplexity; by learning rate."""
    out = []
    for rate in lm.RATES:
        won = []
        for weight in lm.WEIGHTS:
            arms = [lm.decayed(kind, rate, weight) for kind in lm.DECAYS]
            causes, scores = (results.paired(name, *arms) for name in (cause, _PERPLEXITY))
            if len(causes[0]) and len(causes[0]) == len(scores[0]):
                won += ((causes[0] > causes[1]) == (scores[0] < scores[1])).tolist()
        if won:
            share = float(np.mean(won))
            words = f"{rate} rate: the larger {_name(cause)} wins in {sum(won)} of {len(won)} pairs"
            out.append(Evidence(WHERE, words, share > 0.5 if wins else share <= 0.5))
    return out


def _name(score: str) -> str:
    return score.replace("_", " ")


def _warm_start(results: Results) -> list[Claim]:
    pairs = (("warm_start", "spectral"), ("warm_start_ratio", "spectral_ratio"))
    return [
        Claim(
            "L10",
            "Some dense updates before factorising are no worse than factors from the start",
            "spectral has not the better perplexity after as many updates in all, with ranks by either rule",
            [e for pair in pairs for e in _better(results, *pair, no_worse=True)],
            required=True,
        ),
        Claim(
            "L11",
            "They are better",
            "the warm start has the better perplexity",
            [e for pair in pairs for e in _better(results, *pair)],
        ),
    ]


def _sizes(results: Results) -> Claim:
    return Claim(
        "L12",
        "Factors are better than a narrower dense model of as many parameters (not a claim of the paper)",
        "spectral has the better perplexity at every rank",
        [
            evidence
            for rank in lm.RANKS
            for evidence in _better(results, lm.arm("spectral", rank), lm.narrow(rank))
        ],
    )


def _times(found: Mapping[str, Any]) -> Claim:
    evidence = []
    for rank in lm.RANKS if found else ():
        ratios = timing.ratios(found, lm.arm("spectral", rank))
        ratio = intervals.over_seeds(ratios)
        words = (
            f"rank {rank}: a step takes {intervals.text(ratio)} of the dense step's time, "
            f"{len(ratios)} rounds in turns"
        )
        evidence.append(Evidence(STEPS, words, ratio["high"] < 1))
    return Claim(
        "L13",
        "Factors make a step faster",
        "less than the dense step's time at every rank, with the interval over rounds",
        evidence,
    )
