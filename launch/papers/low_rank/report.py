"""The claims of low-rank training and how each is measured, on language (L) and on images (V), with the page.

Arms of the same seed share their data, their order and the part of their initialisation that does not depend on the
arm, so that they are compared in pairs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.launch.papers.low_rank import experiment
from espalier.launch.papers.low_rank.experiment import PLACES, Results, arm_name
from espalier.launch.papers.low_rank.figures import figures
from espalier.launch.papers.low_rank.measures import (
    PERPLEXITY,
    RANK,
    STEP,
    above_the_middle,
    at_best,
    at_the_same,
    closed,
    decays,
    step_ratio,
    times,
)
from espalier.launch.papers.shared import claim, page
from espalier.launch.papers.shared.claim import Measure, Planned
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import average, compare
from espalier.launch.plots import intervals

_PROSE = Prose.of(__name__)

SAME = 5  # % of spectral's perplexity: how much the singular values of the start may change it
NO_WORSE = 2  # % of perplexity
ALIKE = 2  # % of perplexity
EQUAL = 0.01  # of accuracy
_DRAWN = experiment.INITS[1:]
_SMALLER = min(experiment.RANKS)
_WEIGHT = experiment.WEIGHTS[1]  # of decay, at which the two kinds are compared
_OTHERS = [weight for weight in experiment.WEIGHTS if weight != _WEIGHT]
_PILOT = "seeds 10 to 14"
_IMAGE_PILOT = f"{_PILOT}, at a rank of 0.3"
_GRID_PILOT = "means of seed 90, deviations of the part `lm`"


def _percent(*pairs: tuple[str, str]) -> Measure:
    """Returns a measure of how much less perplexity the first arm of each pair has, in per cent of the other's."""
    return compare(PERPLEXITY, *pairs, relative=True)


_LM, _WIDE, _IMAGES, _RANKS, _DECAYS = "lm", "wide", "vision", "ranks", "decays"
_FULL, _HALF = (
    experiment.image_arm("spectral", "frobenius", rate) for rate in experiment.IMAGE_RATES
)
_L2 = experiment.image_arm("spectral", "l2", "full")
# Factors from a spectral and from a He start and the dense network, by rate.
_GAPS = {
    rate: (
        experiment.image_arm("spectral", "frobenius", rate),
        experiment.image_arm("he", "frobenius", rate),
        experiment.image_dense(rate),
    )
    for rate in experiment.IMAGE_RATES
}
# Dense updates before factorising and factors from the start, at the full rate, by both rules of ranks.
_WARM = [
    (experiment.warm("full", ranks), experiment.spectral("full", ranks))
    for ranks in experiment.RANK_RULES
]

# The same decay of both kinds, where both grids have it.
_SHARED = [
    decays(weight) for weight in experiment.GRIDS["frobenius"] if weight in experiment.GRIDS["l2"]
]
_SPECTRAL = {rank: experiment.arm("spectral", rank) for rank in experiment.IMAGE_RANKS}
_STARTS = (experiment.arm("spectral", experiment.HE_RANK), experiment.arm("he", experiment.HE_RANK))
_LEAST, _MOST = min(experiment.IMAGE_RANKS), max(experiment.IMAGE_RANKS)
# A rank and the next smaller one.
_STEPS = list(zip(experiment.IMAGE_RANKS[1:], experiment.IMAGE_RANKS, strict=False))
_BY_RANK = "textures at a rank of 0.1 (seeds 20 to 31) and of 0.3 (seeds 10 to 14)"

CLAIMS = (
    _PROSE.claim(
        "L1",
        _LM,
        _percent(("dense", "spectral")),
        above=0.0,
        planned=Planned(sd=1.54, expected=2.9, source=_PILOT),
        required=True,
        secondary={
            _LM: [_percent(("dense", "spectral_ones"), ("dense", "he"))],
            _WIDE: [_percent(("dense", "spectral"), ("dense", "he"))],
        },
    ),
    _PROSE.claim(
        "L2",
        _LM,
        _percent(("spectral", "he")),
        above=0.0,
        planned=Planned(sd=1.35, expected=2.1, source=_PILOT),
        required=True,
        secondary={
            _LM: [
                _percent(("spectral_ones", "he")),
                *(closed(init, "he") for init in _DRAWN),
            ],
            _WIDE: [_percent(("spectral", "he")), closed("spectral", "he")],
        },
    ),
    _PROSE.claim(
        "L3",
        _LM,
        _percent(("spectral_ones", "spectral")),
        above=-SAME,
        below=SAME,
        planned=Planned(sd=1.83, expected=-2.6, source=_PILOT),
        required=True,
        secondary={_LM: [_percent(tuple(experiment.arm(i, _SMALLER) for i in _DRAWN[::-1]))]},
    ),
    _PROSE.claim(
        "L4",
        _LM,
        _percent((experiment.arm("spectral", _SMALLER), experiment.arm("he", _SMALLER))),
        above=0.0,
        planned=Planned(sd=2.0, expected=2.1, source=_PILOT),
        secondary={
            _LM: [
                _percent(
                    (experiment.arm("spectral_ones", _SMALLER), experiment.arm("he", _SMALLER)),
                    *(("dense", experiment.arm(init, _SMALLER)) for init in experiment.INITS),
                )
            ]
        },
    ),
    _PROSE.claim(
        "L5",
        _LM,
        _percent(decays(_WEIGHT)),
        above=0.0,
        planned=Planned(sd=1.0, expected=4.0, source=_PILOT),
        required=True,
        secondary={
            _LM: [
                _percent(
                    *map(decays, _OTHERS),
                    *((arm, "spectral") for weight in experiment.WEIGHTS for arm in decays(weight)),
                )
            ]
        },
    ),
    _PROSE.claim(
        "L6",
        _LM,
        compare(RANK, decays(_WEIGHT)),
        above=0.0,
        planned=Planned(sd=0.16, expected=1.0, source=_PILOT),
        required=True,
        secondary={_LM: [compare(RANK, *map(decays, _OTHERS))]},
    ),
    _PROSE.claim(
        "L7",
        _LM,
        at_the_same(STEP, _WEIGHT),
        above=0.0,
        planned=Planned(sd=0.8, expected=2.0, source=_PILOT),
        required=True,
        secondary={_LM: [at_the_same(STEP, *_OTHERS)]},
    ),
    _PROSE.claim(
        "L8",
        _LM,
        at_the_same(RANK, _WEIGHT),
        above=-ALIKE,
        below=ALIKE,
        planned=Planned(sd=0.8, expected=0.0, source=_PILOT),
        secondary={_LM: [at_the_same(RANK, *_OTHERS)]},
    ),
    _PROSE.claim(
        "L9",
        _LM,
        _percent((experiment.long("half"), experiment.long("full"))),
        above=-NO_WORSE,
        planned=Planned(sd=1.26, expected=0.0, source=_PILOT),
        secondary={_LM: [_percent((experiment.spectral("half"), "spectral"))]},
    ),
    _PROSE.claim(
        "L10",
        _LM,
        average(
            "perplexity, gain of a dense start over factors from the start, mean of both rules of ranks",
            *map(_percent, _WARM),
        ),
        above=0.0,
        planned=Planned(sd=2.1, expected=2.5, source=_PILOT),
        required=True,
        secondary={
            _LM: [
                _percent(
                    *_WARM,
                    (experiment.warm("half"), experiment.spectral("half")),
                    (experiment.warm("half"), "spectral"),
                )
            ]
        },
    ),
    _PROSE.claim(
        "L12",
        "timing",
        times(experiment.SMALLER[0]),
        below=1.0,
        planned=Planned(sd=0.13, expected=0.8, source="5 rounds on a busy machine"),
        looks=(experiment.ROUNDS,),
        secondary={"timing": [times(experiment.SMALLER[1], "spectral")]},
    ),
    _PROSE.claim(
        "L13",
        "gpt2",
        times(experiment.SMALLER[1]),
        below=1.0,
        planned=Planned(sd=0.05, expected=0.85, source="the steps at a width of 256"),
        looks=(experiment.GPT2_ROUNDS,),
        secondary={"gpt2": [times("spectral")]},
    ),
    _PROSE.claim(
        "L14",
        _DECAYS,
        at_best(PERPLEXITY, "frobenius", "l2", unit="%"),
        above=0.0,
        planned=Planned(sd=1.5, expected=2.0, source=_GRID_PILOT),
        looks=experiment.looks(_DECAYS),
        secondary={_DECAYS: [_percent(*_SHARED)]},
    ),
    _PROSE.claim(
        "L15",
        _DECAYS,
        at_best(RANK, "frobenius", "l2"),
        above=0.0,
        planned=Planned(sd=0.6, expected=1.2, source=_GRID_PILOT),
        looks=experiment.looks(_DECAYS),
        secondary={_DECAYS: [compare(RANK, *_SHARED)]},
    ),
    _PROSE.claim(
        "L16",
        _DECAYS,
        at_best(PERPLEXITY, "frobenius", "none", unit="%"),
        above=0.0,
        planned=Planned(sd=2.5, expected=5.0, source=_GRID_PILOT),
        looks=experiment.looks(_DECAYS),
        secondary={_DECAYS: [at_best(PERPLEXITY, "l2", "none", unit="%")]},
    ),
    _PROSE.claim(
        "V1",
        _IMAGES,
        average(
            "accuracy, spectral minus the middle between He and dense, mean of both rates",
            *(above_the_middle("accuracy", *arms) for arms in _GAPS.values()),
        ),
        above=0.0,
        planned=Planned(sd=0.006, expected=0.008, source=_IMAGE_PILOT),
        secondary={
            _IMAGES: [
                *(above_the_middle("accuracy", *arms) for arms in _GAPS.values()),
                *(above_the_middle("loss", *arms) for arms in _GAPS.values()),
                compare("accuracy", *((arm, dense) for arm, _, dense in _GAPS.values())),
                above_the_middle("accuracy", _FULL, "narrow", "dense"),
            ]
        },
    ),
    _PROSE.claim(
        "V2",
        _IMAGES,
        compare("accuracy", (_FULL, _L2)),
        above=-EQUAL,
        planned=Planned(sd=0.008, expected=0.0, source=_IMAGE_PILOT),
        secondary={_IMAGES: [compare("loss", (_FULL, _L2))]},
    ),
    _PROSE.claim(
        "V3",
        _IMAGES,
        compare(RANK, (_FULL, _L2)),
        above=0.0,
        planned=Planned(sd=0.2, expected=0.5, source=_IMAGE_PILOT),
    ),
    _PROSE.claim(
        "V4",
        _IMAGES,
        compare("accuracy", (_HALF, _FULL)),
        above=-EQUAL,
        planned=Planned(sd=0.008, expected=0.0, source=_IMAGE_PILOT),
        secondary={_IMAGES: [compare("loss", (_HALF, _FULL)), step_ratio(_HALF, _FULL)]},
    ),
    _PROSE.claim(
        "V5",
        _RANKS,
        compare("accuracy", (_SPECTRAL[_MOST], _SPECTRAL[_LEAST])),
        above=0.0,
        planned=Planned(sd=0.008, expected=0.016, source=_BY_RANK),
        looks=experiment.looks(_RANKS),
        secondary={
            _RANKS: [
                compare("accuracy", *((_SPECTRAL[one], _SPECTRAL[less]) for one, less in _STEPS)),
                *(compare(score, _STARTS) for score in ("accuracy", "loss")),
            ]
        },
    ),
    _PROSE.claim(
        "V6",
        _RANKS,
        compare("accuracy", (_SPECTRAL[_MOST], "dense")),
        above=-EQUAL,
        planned=Planned(sd=0.005, expected=-0.004, source=_BY_RANK),
        looks=experiment.looks(_RANKS),
        secondary={
            _RANKS: [
                compare("accuracy", *((_SPECTRAL[less], "dense") for _, less in _STEPS)),
                compare("loss", *((one, "dense") for one in _SPECTRAL.values())),
            ]
        },
    ),
)


_COLUMNS = {
    "lm": ("parameters", "perplexity", "effective_rank", "effective_step"),
    "wide": ("parameters", "perplexity", "effective_rank", "effective_step"),
    "vision": ("parameters", "accuracy", "effective_rank", "effective_step"),
    "ranks": ("parameters", "accuracy", "effective_rank", "effective_step"),
    "decays": ("parameters", "perplexity", "effective_rank", "effective_step"),
}
_FORMATS = {"parameters": "{:,.0f}", "effective_step": "{:.2e}"}


def _setup(parts: Mapping[str, Any]) -> list[str]:
    out = [
        _PROSE(part, place=PLACES[part], amount=parts[part].amount())
        for part in _COLUMNS
        if part in parts
    ]
    for part, text in (("timing", "steps"), ("gpt2", "gpt2_steps")):
        if times := parts.get(part):
            out.append(_PROSE(text, rounds=len(next(iter(times["seconds"].values())))))
    out.append(_PROSE("terms"))
    missing = []
    for part, sweep in experiment.SWEEPS.items():
        if runs := parts.get(part):
            _, _, argument = sweep.format(seeds=1).partition(":")
            arms = list(experiment.get_config(argument).arms)
            missing += runs.missing(arms, experiment.looks(part)[0])
    return [*out, *page.missing(missing, tuple(PLACES), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    out = []
    for part, columns in _COLUMNS.items():
        if runs := parts.get(part):
            rows = [
                (arm_name(arm), str(len(runs.find(arm))), *(_cell(runs, arm, c) for c in columns))
                for arm in runs.arms
            ]
            header = ("arm", "seeds", *map(arm_name, columns))
            out += page.table(header, rows, f"{PLACES[part].capitalize()}: all arms")
    for part, title in (("timing", ""), ("gpt2", " of GPT-2 small")):
        if times := parts.get(part):
            rows = [
                (
                    arm_name(arm),
                    f"{1e3 * float(np.median(seconds)):,.2f}",
                    intervals.text(intervals.over_seeds(experiment.time_ratios(times, arm))),
                )
                for arm, seconds in times["seconds"].items()
            ]
            header = ("arm", "milliseconds, median round", "over dense, mean of rounds")
            out += page.table(header, rows, f"Time of a training step{title}")
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
    for part in experiment.TIMING:
        if times := out.get(part):
            rounds = [rng.permutation(one) for one in zip(*times["seconds"].values(), strict=True)]
            by_arm = zip(times["seconds"], np.transpose(rounds).tolist(), strict=True)
            out[part] = {**times, "seconds": dict(by_arm)}
    return out


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    results = {part: Results(measured[part]) for part in _COLUMNS if measured.get(part)}
    return results | {part: measured[part] for part in experiment.TIMING if measured.get(part)}


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
    headline=page.Headline(
        claim="L2",
        what="perplexity that factors save by starting from the directions of a dense draw",
        unit="%",
        paper=2.1,
        measure=_percent(("spectral", "he")),
        part=_LM,
        why=_PROSE("why"),
        mind=_PROSE("mind"),
    ),
)
