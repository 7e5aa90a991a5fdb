"""Measures of the claims on MoV and MoLORA that are not differences of two arms."""

import numpy as np

from espalier.launch.papers.mov.runs import (
    ACCURACY,
    BASE,
    FULL,
    IA3,
    MAIN,
    MOV,
    NARROW,
    SCORE,
    Runs,
    plain,
)
from espalier.launch.papers.shared.claim import Effect, Measure
from espalier.launch.papers.shared.results import Case


def saturating(runs: Runs, where: str) -> list[Effect]:
    """Compares the gain of the first vectors over one with that of more vectors over the first."""
    scores = [runs.scores(arm, SCORE) for arm in (IA3, *MOV)]
    gaps = (2 * scores[1] - scores[0] - scores[2]).dropna()
    if gaps.empty:
        return []
    early, late = ((b - a)[gaps.index].mean() for a, b in zip(scores, scores[1:], strict=False))
    first, most = (runs.label(arm) for arm in MOV)
    return [
        Effect(
            where=where,
            what=f"{SCORE}, gain of {first} over {runs.label(IA3)} minus that of {most} over {first}",
            by_seed={int(seed): float(gap) for seed, gap in gaps.items()},
            note=f"{early:.3f} and {late:.3f}",
            unmet=runs.unmet(SCORE, IA3, *MOV),
        )
    ]


def within_reach(arm: str, score: str = SCORE) -> Measure:
    """Returns a measure of how far an arm is above full tuning, as a share of what the latter gains over the frozen model."""

    def measure(runs: Runs, where: str) -> list[Effect]:
        both = [runs.scores(name, score) for name in (arm, FULL, BASE)]
        shares = ((both[0] - both[1]) / (both[1] - both[2])).dropna()
        if shares.empty:
            return []
        means = (
            f"{runs.label(n)} {x[shares.index].mean():.3f}"
            for n, x in zip((arm, FULL, BASE), both, strict=True)
        )
        return [
            Effect(
                where=where,
                what=f"{plain(score)}, {runs.label(arm)} minus full tuning, as a share of what that gains",
                by_seed={int(seed): float(share) for seed, share in shares.items()},
                note=", ".join(means),
                unmet=runs.unmet(score, arm, FULL),
            )
        ]

    return measure


def gain_by_width(one: str, other: str) -> Measure:
    """Returns a measure of how much larger an arm's gain over another is in the wider model."""

    def measure(runs: Runs, where: str) -> list[Effect]:
        cases: list[Case] = [(arm, width) for width in (MAIN, NARROW) for arm in (one, other)]
        scores = [runs.scores(arm, SCORE, width) for arm, width in cases]
        wide, narrow = scores[0] - scores[1], scores[2] - scores[3]
        gaps = (wide - narrow).dropna()
        if gaps.empty:
            return []
        labels = runs.label(one), runs.label(other)
        return [
            Effect(
                where=where,
                what=f"{SCORE}, gain of {labels[0]} over {labels[1]} at width {MAIN} minus that at width {NARROW}",
                by_seed={int(seed): float(gap) for seed, gap in gaps.items()},
                note=f"{wide[gaps.index].mean():.3f} and {narrow[gaps.index].mean():.3f}",
                unmet=runs.unmet(SCORE, *cases),
            )
        ]

    return measure


def by_task(arm: str, kind: str) -> Measure:
    """Returns a measure of how much further apart routers keep two compositions than the halves of one's rows."""

    def measure(runs: Runs, where: str) -> list[Effect]:
        by_seed = runs.specialisation(arm, kind)
        if not by_seed:
            return []
        layers, wordings = (
            ", ".join(f"{x:.3f}" for x in np.mean([*values.values()], axis=0))
            for values in (by_seed, runs.specialisation(arm, kind, "wordings"))
        )
        return [
            Effect(
                where=where,
                what=f"distance of two compositions' experts minus that of halves of rows, {runs.label(arm)}, {plain(kind)}",
                by_seed={seed: float(values.mean()) for seed, values in by_seed.items()},
                note=f"by layer, the encoder's first: {layers}; with two wordings in place of halves: {wordings}",
            )
        ]

    return measure


def points(runs: Runs, where: str) -> list[Effect]:
    """Measures the gain of several vectors over one in points of accuracy, as the paper reports it."""
    (one,) = runs.gain(where, ACCURACY, MOV[0], IA3) or [None]
    if one is None:
        return []
    by_seed = {seed: 100 * value for seed, value in one.by_seed.items()}
    return [Effect(where=where, what=one.what, by_seed=by_seed, unit="points")]
