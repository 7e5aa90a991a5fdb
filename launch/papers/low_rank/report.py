"""The claims of low-rank training and how each is measured, on language (L) and on images (V), with the page.

Arms of the same seed share their data, their order and the part of their initialisation that does not depend on the
arm, so that they are compared in pairs.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.low_rank import experiment
from espalier.launch.papers.low_rank.experiment import PLACES, Results, arm_name
from espalier.launch.papers.low_rank.figures import figures
from espalier.launch.papers.shared import claim, page
from espalier.launch.papers.shared.claim import Effect, Measure
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import compare
from espalier.launch.plots import intervals

_PROSE = Prose.of(__name__)

SAME = 5  # % of spectral's perplexity: how much the singular values of the start may change it
NO_WORSE = 1  # % of perplexity
CLOSE = 0.02  # of accuracy: the gap to dense that may remain
EQUAL = 0.01  # of accuracy
_PERPLEXITY, _RANK, _STEP = "perplexity", "effective_rank", "effective_step"
_DRAWN = experiment.INITS[1:]
_SMALLER = min(experiment.RANKS)
_DECAYS = [
    (experiment.decayed("frobenius", rate, weight), experiment.decayed("l2", rate, weight))
    for weight, rate in itertools.product(experiment.WEIGHTS, experiment.RATES)
]
_IMAGE_DECAYS = [
    (
        experiment.image_arm("spectral", "frobenius", rate),
        experiment.image_arm("spectral", "l2", rate),
    )
    for rate in experiment.IMAGE_RATES
]
_CLOSE = [
    (experiment.image_arm(init, "frobenius", rate), experiment.image_dense(rate))
    for init, rate in itertools.product(_DRAWN, experiment.IMAGE_RATES)
]


def same(runs: Results, where: str) -> list[Effect]:
    """Compares spectral ones with spectral at every rank, within a tolerance."""
    pairs = [
        (experiment.arm("spectral_ones", rank), experiment.arm("spectral", rank))
        for rank in experiment.RANKS
    ]
    bounds = {"above": -SAME, "below": SAME, "relative": True}
    return compare(_PERPLEXITY, *pairs, **bounds)(runs, where)


def order(cause: str, **bounds: float) -> Measure:
    """Returns a measure of how a property of runs orders L2 and Frobenius decay of one lambda and rate.

    It is Kendall's tau of the property with quality, over the pairs of a rate: 1 where more of it is always better, -1
    where less is.
    """

    def measure(runs: Results, where: str) -> list[Effect]:
        return [
            effect
            for rate in experiment.RATES
            for effect in _order(runs, where, cause, rate, bounds)
        ]

    return measure


def _order(
    runs: Results, where: str, cause: str, rate: str, bounds: Mapping[str, float]
) -> list[Effect]:
    arms = [
        experiment.decayed(kind, rate, weight)
        for weight in experiment.WEIGHTS
        for kind in experiment.DECAYS
    ]
    causes, scores = (runs.by_seed(name, *arms) for name in (cause, _PERPLEXITY))
    seeds = sorted(set(causes) & set(scores))
    if not seeds:
        return []
    size = len(experiment.DECAYS)
    within = {
        seed: float(
            np.mean(
                [
                    _tau(causes[seed][at : at + size], scores[seed][at : at + size])
                    for at in range(0, len(arms), size)
                ]
            )
        )
        for seed in seeds
    }
    pooled = np.mean([_tau(causes[seed], scores[seed]) for seed in seeds])
    return [
        Effect(
            where=where,
            what=f"Kendall's tau of {arm_name(cause)} and quality within a lambda, {rate} rate",
            by_seed=within,
            note=f"over all {len(arms)} decays {pooled:.2f}; {_across_rates(runs, cause)}",
            digits=2,
            **bounds,
        )
    ]


def _tau(causes: Sequence[float], perplexities: Sequence[float]) -> float:
    """Returns Kendall's tau of a cause and quality, which is less perplexity."""
    pairs = itertools.combinations(zip(causes, perplexities, strict=True), 2)
    return float(
        np.mean([np.sign(one[0] - two[0]) * np.sign(two[1] - one[1]) for one, two in pairs])
    )


def _across_rates(runs: Results, cause: str) -> str:
    """Returns how often the one of both rates with more of a cause is better, of one decay, as text."""
    arms = [("none", ""), *itertools.product(experiment.DECAYS, experiment.WEIGHTS)]
    won = []
    for kind, weight in arms:
        pair = [experiment.decayed(kind, rate, weight) for rate in experiment.RATES]
        causes, scores = (runs.by_seed(name, *pair) for name in (cause, _PERPLEXITY))
        won += [_tau(causes[seed], scores[seed]) > 0 for seed in set(causes) & set(scores)]
    return f"of one decay's two rates, the one with more of it is better in {sum(won)} of {len(won)} pairs"


def times(measured: Mapping[str, Any], where: str) -> list[Effect]:
    """Compares the time of a step with the dense model's where all factors are smaller than their matrices."""
    return [
        Effect(
            where=where,
            what=f"time of a step over dense's, {arm_name(arm)}",
            by_seed=dict(enumerate(map(float, experiment.time_ratios(measured, arm)))),
            below=1.0,
            note="by round, in turns",
        )
        for arm in experiment.SMALLER
        if arm in measured["seconds"]
    ]


def halved(runs: Results, where: str) -> list[Effect]:
    """Compares half the learning rate with the full one on images."""
    out = []
    for init, kind in experiment.IMAGE_FACTORS:
        half, full = (experiment.image_arm(init, kind, rate) for rate in ("half", "full"))
        effects = runs.gain(where, "accuracy", half, full, above=-EQUAL)
        steps = runs.paired(_STEP, half, full)
        if effects and len(steps[0]):
            note = f"{effects[0].note}; its effective step is {np.mean(steps[0] / steps[1]):.2f} of the full rate's"
            effects = [dataclasses.replace(effects[0], note=note)]
        out += effects
    return out


CLAIMS = (
    _PROSE.claim(
        "L1",
        {
            "lm": [
                compare(
                    _PERPLEXITY, *(("dense", experiment.arm(init)) for init in experiment.INITS)
                )
            ]
        },
        required=True,
    ),
    _PROSE.claim(
        "L2",
        {
            "lm": [
                compare(
                    _PERPLEXITY, *((experiment.arm(init), experiment.arm("he")) for init in _DRAWN)
                )
            ]
        },
        required=True,
    ),
    _PROSE.claim("L3", {"lm": [same]}, required=True),
    _PROSE.claim(
        "L4",
        {
            "lm": [
                compare(
                    _PERPLEXITY,
                    *(("dense", experiment.arm(init, _SMALLER)) for init in experiment.INITS),
                    *(
                        (experiment.arm(init, _SMALLER), experiment.arm("he", _SMALLER))
                        for init in _DRAWN
                    ),
                )
            ]
        },
    ),
    _PROSE.claim("L5", {"lm": [compare(_PERPLEXITY, *_DECAYS)]}, required=True),
    _PROSE.claim("L6", {"lm": [compare(_RANK, *_DECAYS)]}, required=True),
    _PROSE.claim("L7", {"lm": [order(_STEP, below=0.0)]}, required=True),
    _PROSE.claim("L8", {"lm": [order(_RANK, above=0.0)]}),
    _PROSE.claim(
        "L9",
        {
            "lm": [
                compare(
                    _PERPLEXITY,
                    (experiment.long("half"), experiment.long("full")),
                    above=-NO_WORSE,
                    relative=True,
                )
            ]
        },
    ),
    _PROSE.claim(
        "L10",
        {
            "lm": [
                compare(
                    _PERPLEXITY,
                    *((experiment.warm(rate), "spectral") for rate in ("half", "full")),
                    above=-NO_WORSE,
                    relative=True,
                )
            ]
        },
        required=True,
    ),
    _PROSE.claim(
        "L11",
        {
            "lm": [
                compare(
                    _PERPLEXITY,
                    *(
                        pair
                        for rate in ("full", "half")
                        for pair in (
                            (experiment.warm(rate), experiment.decayed("none", rate)),
                            (experiment.warm(rate, "_ratio"), experiment.ratio_arm(rate)),
                        )
                    ),
                )
            ]
        },
    ),
    _PROSE.claim("L12", {"timing": [times]}),
    _PROSE.claim("V1", {"vision": [compare("accuracy", *_CLOSE, above=-CLOSE)]}, required=True),
    _PROSE.claim("V2", {"vision": [compare("accuracy", *_IMAGE_DECAYS, above=-EQUAL)]}),
    _PROSE.claim("V3", {"vision": [compare(_RANK, *_IMAGE_DECAYS)]}),
    _PROSE.claim("V4", {"vision": [halved]}),
)


_COLUMNS = {
    "lm": ("parameters", "perplexity", "effective_rank", "effective_step"),
    "vision": ("parameters", "accuracy", "effective_rank", "effective_step"),
}
_FORMATS = {"parameters": "{:,.0f}", "effective_step": "{:.2e}"}


def _setup(parts: Mapping[str, Any]) -> list[str]:
    out = [
        _PROSE(part, place=PLACES[part], amount=parts[part].amount())
        for part in ("lm", "vision")
        if part in parts
    ]
    if times := parts.get("timing"):
        first = next(iter(times["seconds"].values()))
        out.append(_PROSE("steps", rounds=len(first)))
    out.append(_PROSE("terms"))
    language = parts.get("lm")
    missing = (
        language.missing(list(experiment.get_config().arms), language.seeds) if language else []
    )
    return [*out, *page.missing(missing, tuple(PLACES), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    out = []
    for part, columns in _COLUMNS.items():
        if runs := parts.get(part):
            rows = [
                (arm_name(arm), *(_cell(runs, arm, column) for column in columns))
                for arm in runs.arms
            ]
            header = ("arm", *map(arm_name, columns))
            out += page.table(header, rows, f"{PLACES[part].capitalize()}: all arms")
    if times := parts.get("timing"):
        rows = [
            (
                arm_name(arm),
                f"{1e3 * float(np.median(seconds)):.2f}",
                intervals.text(intervals.over_seeds(experiment.time_ratios(times, arm))),
            )
            for arm, seconds in times["seconds"].items()
        ]
        header = ("arm", "milliseconds, median round", "over dense, mean of rounds")
        out += page.table(header, rows, "Time of a training step")
    return out


def _cell(runs: Results, arm: str, column: str) -> str:
    values = runs.values(arm, column)
    if not values.size:
        return ""
    if column in _FORMATS:
        return _FORMATS[column].format(values.mean())
    return runs.mean(values, column)


def _shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the rows with arms exchanged at random, and the times of a round too."""
    out = claim.shuffle_arms(measured, rng)
    if times := out.get("timing"):
        rounds = [rng.permutation(one) for one in zip(*times["seconds"].values(), strict=True)]
        by_arm = zip(times["seconds"], np.transpose(rounds).tolist(), strict=True)
        out["timing"] = {**times, "seconds": dict(by_arm)}
    return out


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    results = {part: Results(measured[part]) for part in _COLUMNS if measured.get(part)}
    return results | ({"timing": measured["timing"]} if measured.get("timing") else {})


REPORT = page.Report(
    slug="low_rank",
    title="Low-rank training: the paper's claims on small models",
    source="[Exploring Low Rank Training of Deep Neural Networks, arXiv 2209.13569](https://arxiv.org/abs/2209.13569)",
    claims=CLAIMS,
    places=PLACES,
    read=_read,
    figures=figures,
    setup=_setup,
    tables=_tables,
    shuffle=_shuffle,
)
