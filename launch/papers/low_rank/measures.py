"""How the claims of low-rank training are measured, where that is more than the difference of two arms."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.low_rank import experiment
from espalier.launch.papers.low_rank.experiment import Results, arm_name
from espalier.launch.papers.shared.claim import Effect, Measure
from espalier.launch.plots import intervals

PERPLEXITY, RANK, STEP = "perplexity", "effective_rank", "effective_step"


def decays(weight: str) -> tuple[str, str]:
    """Returns the arms of both decays with a weight: of the product, and of the factors."""
    return experiment.decayed("frobenius", weight), experiment.decayed("l2", weight)


def at_the_same(cause: str, *weights: str) -> Measure:
    """Returns a measure of how decay of the product compares with decay of the factors of another weight.

    That weight gives as much of the cause as the product's decay has, the effective rank or the effective step. Perplexity
    there is interpolated between factors without decay and those of each weight, by lines of its logarithm over that of the
    cause. The effect is positive where decay of the product has less perplexity: the cause does not explain that.
    """

    def measure(runs: Results, where: str) -> list[Effect]:
        return [effect for weight in weights for effect in _at_the_same(runs, where, cause, weight)]

    return measure


def _at_the_same(runs: Results, where: str, cause: str, weight: str) -> list[Effect]:
    line = [experiment.spectral("full"), *(decays(other)[1] for other in experiment.WEIGHTS)]
    arm = decays(weight)[0]
    causes, scores = (runs.by_seed(name, arm, *line) for name in (cause, PERPLEXITY))
    gaps = {seed: gap_to_line(causes[seed], scores[seed]) for seed in causes if seed in scores}
    if not gaps:
        return []
    beyond = [seed for seed, gap in gaps.items() if math.isnan(gap)]
    seeds = ", ".join(map(str, beyond))
    unmet = f"no weight of L2 gives that {arm_name(cause)} (seed {seeds})" if beyond else ""
    what = f"perplexity, gain of {arm_name(arm)} over L2 of the same {arm_name(cause)}"
    return [Effect(where=where, what=what, by_seed=gaps, unit="%", digits=2, unmet=unmet)]


def gap_to_line(causes: Sequence[float], perplexities: Sequence[float]) -> float:
    """Returns how much less perplexity the first point has than the line through the others, in per cent of the line's.

    NaN where the first point's cause lies beyond the others'.
    """
    (x, *xs), (y, *ys) = np.log(causes), np.log(perplexities)
    order = np.argsort(xs)
    on_line = np.interp(x, np.take(xs, order), np.take(ys, order), left=np.nan, right=np.nan)
    return float(-100 * np.expm1(y - on_line))


def closed(init: str, other: str) -> Measure:
    """Returns a measure of the share of the gap between another arm and the dense one that a start closes."""

    def measure(runs: Results, where: str) -> list[Effect]:
        found = runs.by_seed(PERPLEXITY, init, other, "dense")
        what = f"share of the gap from {arm_name(other)} to dense that {arm_name(init)} closes"
        by_seed = {seed: (low - mine) / (low - high) for seed, (mine, low, high) in found.items()}
        return [Effect(where=where, what=what, by_seed=by_seed, digits=2)] if by_seed else []

    return measure


def times(*arms: str) -> Measure:
    """Returns a measure of an arm's time of a step divided by the dense model's."""

    def measure(measured: Mapping[str, Any], where: str) -> list[Effect]:
        return [
            Effect(
                where=where,
                what=f"time of a step over dense's, {arm_name(arm)}",
                by_seed=dict(enumerate(map(float, experiment.time_ratios(measured, arm)))),
                note="by round, in turns",
            )
            for arm in arms
            if arm in measured["seconds"]
        ]

    return measure


def above_the_middle(score: str, arm: str, low: str, high: str) -> Measure:
    """Returns a measure of how far an arm is ahead of the middle between two others.

    It is above 0 where the arm closes more than half of the gap from `low` to `high`; unlike the share itself, it is no ratio of
    noisy numbers.
    """

    def measure(runs: Results, where: str) -> list[Effect]:
        found = runs.by_seed(score, arm, low, high)
        if not found:
            return []
        sign = -1 if runs.lower_is_better(score) else 1
        mine, less, more = sign * np.array(list(found.values())).T
        unmet = runs.unmet(score, arm, low, high)
        gap = intervals.student(more - less)
        if not unmet and gap["low"] <= 0:
            unmet = (
                f"no gap to close: {arm_name(high)} is not certainly better than {arm_name(low)}"
            )
        share = (mine - less).mean() / (more - less).mean()
        digits = runs.digits(score)
        return [
            Effect(
                where=where,
                what=f"{score}, {arm_name(arm)} minus the middle between {arm_name(low)} and {arm_name(high)}",
                by_seed=dict(zip(found, map(float, mine - (less + more) / 2), strict=True)),
                digits=digits,
                note=f"{100 * share:.0f} % of a gap of {intervals.text(gap, digits)}",
                unmet=unmet,
            )
        ]

    return measure


def step_ratio(arm: str, other: str) -> Measure:
    """Returns a measure of an arm's effective step divided by another's."""

    def measure(runs: Results, where: str) -> list[Effect]:
        found = runs.by_seed(STEP, arm, other)
        what = f"effective step, {arm_name(arm)} over {arm_name(other)}"
        by_seed = {seed: mine / its for seed, (mine, its) in found.items()}
        return [Effect(where=where, what=what, by_seed=by_seed, digits=2)] if by_seed else []

    return measure
