"""The claims of BAM and how each is measured, with plots and the page.

Arms of the same seed start from the same seed model and specialists, and read the same data in the same order, so
that they are compared in pairs. *Data-matched* arms train on as many tokens as BTX, and BAM computes more;
*compute-matched* ones make as many updates as would cost what BTX's do, were the models the paper's of 590M parameters.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from espalier.launch.papers.bam import experiment, figures
from espalier.launch.papers.bam.experiment import (
    DENSE,
    DENSE_LONG,
    LATENCY,
    SEED,
    WIDTHS,
    Runs,
    biased,
    long,
    matched,
    specialist,
    wide,
)
from espalier.launch.papers.shared import claim, domains
from espalier.launch.papers.shared.claim import Effect, Measure, Planned
from espalier.launch.papers.shared.domains import (
    BALANCE,
    LOAD_BOUND,
    MEAN,
    PERPLEXITY,
    SIZES,
    SYNTHETIC,
    TEXT,
    off,
    on,
    pairs,
)
from espalier.launch.papers.shared.headline import Headline
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import average

_PROSE = Prose.of(__name__)

SAME = 2.0  # per cent of BTX's loss: what counts as no worse
RESCUED = 0.5  # of the gap between BTX and BAM, that copies of the seed may close
ENOUGH = 1500  # updates of a mixture; fewer allow no conclusion against dense training
MARGIN = 0.02  # nats: what counts as no worse
SLOWER = 50.0  # per cent: by how much longer BAM may take to answer
PLACES = {LATENCY: "590M"}
_BOUND = f"no layer of a top-1 router may send more than {LOAD_BOUND} of the tokens to one expert"


def home(runs: Runs, where: str) -> list[Effect]:
    """Compares each specialist with the seed and the other specialists on its own domain."""
    special = runs.domains[1:]
    return [
        effect
        for domain in special
        for other in (SEED, *(specialist(x) for x in special if x != domain))
        for effect in runs.gain(where, on(domain), specialist(domain), other)
    ]


def elsewhere(runs: Runs, where: str) -> list[Effect]:
    """Compares the seed with each specialist on the other domains."""
    return [
        effect
        for domain in runs.domains[1:]
        for effect in runs.gain(where, off(domain), SEED, specialist(domain))
    ]


def beside_the_middle(runs: Runs, where: str, *, arm: str, nearer_to_bam: bool) -> list[Effect]:
    """Measures on which side of the middle between BTX and BAM an arm's loss lies."""
    cases = ("btx", "bam", arm)
    losses = pd.concat([runs.scores(case, MEAN) for case in cases], axis=1, join="inner")
    if losses.empty:
        return []
    btx, bam, other = (losses.iloc[:, i] for i in range(3))
    gap, closed = (btx - bam).mean(), (btx - other).mean()
    middle = btx - RESCUED * (btx - bam)
    beyond = middle - other if nearer_to_bam else other - middle
    side = "below" if nearer_to_bam else "above"
    what = f"{MEAN}, by how much {runs.label(arm)} lies {side} the middle between BTX and BAM"
    note = f"of a gap of {gap:.3f} it closes {closed:.3f}"
    no_gap = "" if gap > 0 else "BAM is not ahead of BTX: there is no gap to close"
    return [
        Effect(
            where=where,
            what=what,
            by_seed={int(seed): float(value) for seed, value in beyond.items()},
            note=note,
            unmet=no_gap or runs.unmet(MEAN, *cases),
        )
    ]


def beside_dense(runs: Runs, where: str, *, arm: str) -> list[Effect]:
    """Compares a mixture that was trained for long with the seed trained on all tokens."""
    trained = long(arm)
    steps = min((row["step"] for row in runs.find(trained).values()), default=0)
    few = {"unmet": f"{steps:,} of {ENOUGH:,} updates"} if steps < ENOUGH else {}
    place = f"{where}, {steps:,} updates of the mixture"
    return runs.gain(place, MEAN, trained, DENSE_LONG, **few)


def growth(runs: Runs, where: str) -> list[Effect]:
    """Compares BAM's lead over BTX at the larger width with that at the smaller one."""
    leads = [
        runs.scores(wide("btx", width), MEAN) - runs.scores(wide("bam", width), MEAN)
        for width in WIDTHS
    ]
    gaps = (leads[1] - leads[0]).dropna()
    if gaps.empty:
        return []
    what = f"{MEAN}, BAM's lead over BTX at width {WIDTHS[1]} minus that at width {WIDTHS[0]}"
    by_seed = {int(seed): float(value) for seed, value in gaps.items()}
    return [Effect(where=where, what=what, by_seed=by_seed)]


def faster(
    timed: Mapping[str, Any], where: str, *, arm: str, other: str, parts: Sequence[str]
) -> list[Effect]:
    """Measures by how many per cent an arm takes less time than another, by session."""
    names = {"read": "read a prompt", "generate": "generate", "score": "score a text"}
    by_seed, seconds = {}, []
    for seed, session in timed.items():
        one, two = (sum(session["result"][a][part] for part in parts) for a in (arm, other))
        by_seed[int(seed)] = 100 * (1 - one / two)
        seconds.append((one, two))
    if not by_seed:
        return []
    means = np.mean(seconds, axis=0)
    labels = [figures.TIMED[a] for a in (arm, other)]
    what = (
        f"seconds to {' and '.join(names[part] for part in parts)}, {labels[0]} below {labels[1]}"
    )
    note = ", ".join(f"{label} {x:.2f} s" for label, x in zip(labels, means, strict=True))
    return [Effect(where=where, what=what, by_seed=by_seed, unit="%", digits=1, note=note)]


def _faster(arm: str, other: str, *parts: str) -> Measure:
    return functools.partial(faster, arm=arm, other=other, parts=parts or ("read", "generate"))


def _all_of(what: str, measure: Measure) -> Measure:
    return average(f"{what}, mean of all pairs", measure)


_SHARED, _BAM = matched("bam_shared_kv"), matched("bam")
_TOP_2, _TOP_1 = matched("moa_top2"), matched("moa_top1")
_AT_WIDTHS = [(wide("bam", width), wide("btx", width)) for width in WIDTHS]


def _planned(sd: float, expected: float, source: str = "seeds 10 to 14") -> Planned:
    return Planned(sd=sd, expected=expected, source=source)


CLAIMS = (
    _PROSE.claim(
        "B1",
        SYNTHETIC,
        _all_of("loss at home, gain of specialists over the seed and other specialists", home),
        above=0.0,
        planned=_planned(0.033, 3.3),
        required=True,
        secondary={SYNTHETIC: [home], TEXT: [home]},
    ),
    _PROSE.claim(
        "B2",
        SYNTHETIC,
        _all_of("mean loss off a domain, gain of the seed over its specialist", elsewhere),
        above=0.0,
        planned=_planned(0.025, 1.9),
        required=True,
        secondary={SYNTHETIC: [elsewhere], TEXT: [elsewhere]},
    ),
    _PROSE.claim(
        "B3",
        SYNTHETIC,
        pairs(("bam", "btx")),
        above=0.0,
        planned=_planned(0.0051, 0.14),
        required=True,
        secondary={
            SYNTHETIC: [
                pairs(("bam", "btx"), score=PERPLEXITY, relative=True, digits=1),
                pairs(("bam_shared_kv", "btx")),
            ]
        },
    ),
    _PROSE.claim(
        "B4",
        SYNTHETIC,
        pairs((_BAM, "btx")),
        above=0.0,
        planned=_planned(0.0034, 0.1),
        secondary={SYNTHETIC: [pairs((_SHARED, "btx"))]},
    ),
    _PROSE.claim(
        "B5",
        SYNTHETIC,
        pairs(("bam", "btx6_top3")),
        above=0.0,
        planned=_planned(0.0065, 0.11),
        required=True,
        secondary={SYNTHETIC: [pairs(("bam", "btx6"))]},
    ),
    _PROSE.claim("B6", SYNTHETIC, pairs((_BAM, "btx6")), above=0.0, planned=_planned(0.0052, 0.11)),
    _PROSE.claim(
        "B7",
        SYNTHETIC,
        _all_of(
            f"{MEAN}, gain of soft routing over top-2 and top-1 at equal compute",
            pairs((_SHARED, _TOP_2), (_SHARED, _TOP_1)),
        ),
        above=0.0,
        planned=_planned(0.0106, 0.032),
        required=True,
        secondary={SYNTHETIC: [pairs((_SHARED, _TOP_2), (_SHARED, _TOP_1), (_TOP_2, _TOP_1))]},
    ),
    _PROSE.claim(
        "B8",
        SYNTHETIC,
        pairs(("bam", "bam_shared_kv")),
        above=0.0,
        planned=_planned(0.0021, 0.05),
        required=True,
        secondary={SYNTHETIC: [pairs((_BAM, _SHARED))]},
    ),
    _PROSE.claim(
        "B9",
        SYNTHETIC,
        _all_of(
            f"{MEAN}, gain of top-2 and top-1 attention over BTX at equal compute",
            pairs((_TOP_2, "btx"), (_TOP_1, "btx"), relative=True, digits=2),
        ),
        above=-SAME,
        planned=_planned(0.6, 0.0),
        secondary={SYNTHETIC: [pairs((_TOP_2, "btx"), (_TOP_1, "btx"), relative=True, digits=2)]},
    ),
    _PROSE.claim(
        "B11",
        SYNTHETIC,
        functools.partial(beside_the_middle, arm="btx6", nearer_to_bam=False),
        above=0.0,
        planned=_planned(0.0048, 0.08),
        required=True,
    ),
    _PROSE.claim(
        "B17",
        SIZES,
        pairs(_AT_WIDTHS[1]),
        above=0.0,
        planned=_planned(0.0051, 0.07, "seeds 10 to 14 at width 64, and half of their effect"),
        secondary={SIZES: [pairs(_AT_WIDTHS[0]), growth]},
    ),
    _PROSE.claim(
        "B18",
        TEXT,
        pairs(("bam", "btx")),
        above=0.0,
        planned=_planned(0.0048, 0.08, "seeds 0 to 2, with other balance losses"),
        required=True,
        secondary={
            TEXT: [
                pairs(("bam", "btx"), score=PERPLEXITY, relative=True, digits=1),
                pairs(("bam", DENSE), ("btx", DENSE)),
            ]
        },
    ),
    _PROSE.claim(
        "B19",
        LATENCY,
        _faster("bam", "btx"),
        above=-SLOWER,
        planned=_planned(8.0, -30.0, "one session, seed 0, and a guess of the deviation"),
        secondary={
            LATENCY: [
                _faster("bam_shared_kv", "btx"),
                _faster("bam", "bam_shared_kv"),
                _faster("btx", DENSE),
                *(_faster("bam", "btx", part) for part in ("read", "generate", "score")),
            ]
        },
    ),
    _PROSE.claim(
        "B13",
        SYNTHETIC,
        pairs(("bam", "bam_averaged")),
        above=0.0,
        planned=_planned(0.0029, 0.035),
        control=True,
    ),
    _PROSE.claim(
        "B14",
        SYNTHETIC,
        functools.partial(beside_dense, arm="bam"),
        above=0.0,
        planned=_planned(0.0054, 0.06),
        control=True,
        secondary={SYNTHETIC: [functools.partial(beside_dense, arm="btx")]},
    ),
    _PROSE.claim(
        "B16",
        SYNTHETIC,
        functools.partial(beside_the_middle, arm="bam_averaged", nearer_to_bam=True),
        above=0.0,
        planned=_planned(0.0028, 0.03),
        control=True,
    ),
    _PROSE.claim(
        "B20",
        BALANCE,
        pairs((biased("bam"), biased("btx"))),
        above=0.0,
        planned=_planned(
            0.0051, 0.07, "seeds 10 to 14 with a balance loss, and half of their effect"
        ),
        control=True,
        secondary={BALANCE: [pairs(("bam", "btx"), (biased("bam"), "bam"))]},
    ),
    _PROSE.claim(
        "B21",
        BALANCE,
        pairs((biased("btx"), "btx")),
        above=-MARGIN,
        planned=_planned(0.0051, 0.0, "the deviation of BAM and BTX in seeds 10 to 14"),
        control=True,
    ),
)


def shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns measurements with arms exchanged, in each session of latencies too."""
    out = domains.shuffle(measured, rng)
    if LATENCY in out:
        out[LATENCY] = {
            seed: {**one, "result": one["result"] | claim.exchanged(_times(one), rng)}
            for seed, one in out[LATENCY].items()
        }
    return out


def _times(session: Mapping[str, Any]) -> dict[str, Any]:
    return {arm: session["result"][arm] for arm in figures.TIMED}


HEADLINE = Headline(
    claim="B3",
    what="by how much BAM's mean perplexity is below BTX's, at equal data",
    unit="%",
    paper=9.5,
    measure=pairs(("bam", "btx"), score=PERPLEXITY, relative=True, digits=1),
    part=SYNTHETIC,
    why=_PROSE("headline_why"),
    mind=_PROSE("headline_mind"),
)
REPORT = domains.report(
    slug="bam",
    title="BAM: the paper's claims on small models",
    source="[BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts, arXiv "
    "2408.08274](https://arxiv.org/abs/2408.08274)",
    text=[_PROSE("method")],
    parts=tuple(experiment.PARTS),
    runs=Runs,
    claims=CLAIMS,
    figures=functools.partial(figures.figures, _PROSE),
    places=PLACES,
    shuffle=shuffle,
    headline=HEADLINE,
)
