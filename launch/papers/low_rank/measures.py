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


def best_weights(runs: Results, kind: str) -> dict[int, str]:
    """Returns by seed the arm of a decay with its best weight: that of least log perplexity, mean over other seeds.

    These are the other seeds of the first block, so that no run is chosen by its own score, and later seeds change no choice.

    Args:
      runs: of the part `decays`.
      kind: of GRIDS, or 'none', whose arm is the same for all seeds.
    """
    arms = _grid(kind)
    scores = {seed: np.log(values) for seed, values in runs.by_seed(PERPLEXITY, *arms).items()}
    block = sorted(scores)[: experiment.looks("decays")[0]]
    others = {seed: [scores[one] for one in block if one != seed] for seed in scores}
    return {
        seed: arms[int(np.mean(some, axis=0).argmin())] for seed, some in others.items() if some
    }


def _grid(kind: str) -> list[str]:
    weights = experiment.GRIDS.get(kind)
    if weights is None:
        return [experiment.spectral("full")]
    return [experiment.decayed(kind, weight) for weight in weights]


def at_best(score: str, kind: str, other: str, **settings: Any) -> Measure:
    """Returns a measure of how much better factors are with one decay than with another, each with its best weight.

    See `best_weights`. There is no verdict where an end of a grid is its best weight for most seeds of the first block: a
    better one may lie beyond.

    Args:
      score: of the runs.
      kind: the decay that is said to be better, of GRIDS: the effect is positive where it is.
      other: the decay that it is compared with, or 'none'.
      **settings: further fields of Effect; with the unit '%' the effect is in per cent of the other's score.
    """

    def measure(runs: Results, where: str) -> list[Effect]:
        chosen = {one: best_weights(runs, one) for one in (kind, other)}
        mine, its = chosen.values()
        arms = list(dict.fromkeys((*mine.values(), *its.values())))
        by_seed = {}
        for seed in mine:
            if seed not in its:
                continue
            one, two = (
                float(runs.scores(arm[seed], score).get(seed, math.nan)) for arm in (mine, its)
            )
            gain = two - one if runs.lower_is_better(score) else one - two
            by_seed[seed] = 100 * gain / two if settings.get("unit") == "%" else gain
        if not by_seed:
            return []
        reasons = [runs.unmet(score, *arms)]
        for one, best in chosen.items():
            grid = _grid(one)
            first = list(best.values())[: experiment.looks("decays")[0]]
            at_end = sum(arm in (grid[0], grid[-1]) for arm in first)
            if len(grid) > 1 and 2 * at_end > len(first):
                reasons.append(f"the best weight of {arm_name(one)} is an end of its grid")
        than = "no decay" if other == "none" else arm_name(other)
        return [
            Effect(
                where=where,
                what=f"{score.replace('_', ' ')}, gain of {arm_name(kind)} over {than} with the best weights",
                by_seed=by_seed,
                note=", ".join(map(arm_name, arms)),
                unmet="; ".join(filter(None, reasons)),
                digits=runs.digits(score),
                **settings,
            )
        ]

    return measure


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
