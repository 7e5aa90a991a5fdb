"""The claims on likelihood and quality and how each is measured.

Only the paper's methods are judged. The stopping rule is in rule.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from launch.papers.preference import fits, numbers, rule, sweep
from launch.papers.preference.numbers import Number, change, of_arm
from launch.papers.preference.results import METHODS, Arm, Course, arms_of, by_seed, find
from launch.papers.shared.claim import FEW_SEEDS, Claim, Effect, Measure, RequiredClaim

APART = 0.05  # of P_win, by which the middle is better than both ends
REDUCTION = 0.15  # of RMSE
GAP_LOSES = 0.05  # of P_win
LARGE = 0.9  # quantile of the gap above which it is large
FRONT_LOSES = 0.01  # of P_win
SPEARMAN = 0.5
PEARSON = 0.2
SMALL = (0.01, 0.1)  # strengths of DPO whose entropy is to turn
TURN = (5, 20)  # updates between which entropy is to be above the start
WEAK, STRONG = 0.1, 50.0  # of DPO beside an NLL term
WEIGHTS = (0.0, 0.1, 1.0)  # of the NLL term; at the strong one the last against the first
HELD = 0.1  # nats that the strong one's likelihood may move without an NLL term
LLH_MOVES, P_WIN_MOVES = 0.02, 0.05  # at most, by an NLL term beside the strong one
TURNS = 0.01  # of P_win, by which the weight in the middle is better than both others


def effect(
    what: str,
    number: Number,
    unmet: Callable[[Sequence[Course]], str] | None = None,
    **settings: Any,
) -> Measure:
    """Returns a measure of one number of the runs of each seed; of seeds where it is None there is no value.

    Args:
      unmet: of the runs of all seeds, why the number gives no verdict.
    """

    def measure(courses: Sequence[Course], where: str) -> list[Effect]:
        numbers = {seed: number(mine) for seed, mine in by_seed(courses).items()}
        values = {seed: float(x) for seed, x in numbers.items() if x is not None}
        if not values:
            return []
        why = "" if unmet is None else unmet(courses)
        return [Effect(where=where, what=what, by_seed=values, unmet=why, **settings)]

    return measure


def ranks(score: str, name: str, beside: Sequence[str] = ("",), **bounds: float) -> list[Measure]:
    """Returns measures of the correlations of a score with better LLH, for each method."""
    return [
        effect(
            f"Spearman's correlation of {name} and better LLH, {label}"
            + (f", at equal {fixed}" if fixed else ""),
            functools.partial(numbers.spearman, score, method, fixed),
            digits=2,
            **bounds,
        )
        for fixed in beside
        for method, (label, _) in METHODS.items()
    ]


def moved_without_nll(courses: Sequence[Course]) -> str:
    """Returns how far the strong DPO moves better LLH by itself, if that is too far."""
    moves = [change("llh_chosen", one) for one in find(courses, Arm("dpo", STRONG))]
    mean = float(np.mean(moves)) if moves else 0.0
    return "" if abs(mean) <= HELD else f"better LLH moves by {mean:.2f} without an NLL term"


_low, _high = fits.MIDDLE
_span = f"{_low:g} to {_high:g} nats"
_INTERMEDIATE = [
    *(
        effect(
            f"P_win where better LLH is {_span} below its start, less where it is {words}",
            functools.partial(numbers.middle_less, *bounds),
            above=APART,
        )
        for words, bounds in (
            (f"less than {fits.EDGES[0]:g} below", (-np.inf, fits.EDGES[0])),
            (f"{fits.EDGES[-1]:g} or more below", (fits.EDGES[-1], np.inf)),
        )
    ),
    effect("quadratic term of the fit", functools.partial(numbers.of_fit, "curvature"), below=0.0),
    effect(
        "share of a line's RMSE that a parabola saves",
        functools.partial(numbers.of_fit, "reduction"),
        above=REDUCTION,
    ),
]
_GAP = [
    effect(
        "P_win at the end, other runs less the run of the largest gap",
        numbers.others_less_largest_gap,
        above=GAP_LOSES,
    ),
    effect(
        "P_win, other evaluations less the tenth with the largest gaps",
        functools.partial(numbers.others_less_large_gaps, LARGE),
        above=GAP_LOSES,
    ),
    effect(
        "P_win, other evaluations less those that none surpasses in both likelihoods",
        numbers.others_less_front,
        above=FRONT_LOSES,
    ),
]
_TURN = [
    measure
    for strength in SMALL
    for measure in (
        effect(
            f"entropy after {TURN[0]} to {TURN[1]} updates less at the start, DPO β = {strength:g}",
            of_arm(Arm("dpo", strength), functools.partial(numbers.rise, "entropy", *TURN)),
            above=0.0,
            unit="bits",
        ),
        effect(
            f"entropy at the end less at the start, DPO β = {strength:g}",
            of_arm(Arm("dpo", strength), functools.partial(change, "entropy")),
            below=0.0,
            unit="bits",
        ),
    )
]
_MASS = [
    effect(
        f"mass at the end less at the start, {arms_of(method)[0].label}",
        of_arm(arms_of(method)[0], functools.partial(change, "mass")),
        below=0.0,
    )
    for method in METHODS
]
_NLL = [
    *(
        effect(
            f"{words} at the end, λ = {WEIGHTS[-1]:g} less λ = 0, β = {STRONG:g}",
            functools.partial(
                numbers.difference, name, Arm("dpo", STRONG, WEIGHTS[-1]), Arm("dpo", STRONG)
            ),
            moved_without_nll,
            above=-most,
            below=most,
        )
        for name, words, most in (
            ("llh_chosen", "better LLH", LLH_MOVES),
            ("p_win", "P_win", P_WIN_MOVES),
        )
    ),
    *(
        effect(
            f"P_win at the end, λ = {WEIGHTS[1]:g} less λ = {weight:g}, β = {WEAK:g}",
            functools.partial(
                numbers.difference, "p_win", Arm("dpo", WEAK, WEIGHTS[1]), Arm("dpo", WEAK, weight)
            ),
            above=TURNS,
        )
        for weight in (WEIGHTS[0], WEIGHTS[-1])
    ),
]
_LENGTH = effect(
    "Pearson's correlation of better LLH and length",
    numbers.length_link,
    above=-PEARSON,
    below=PEARSON,
)
_RATES = (
    f"of runs that are not over-optimised at most {rule.WRONG['false'][1]:.0%} raise an alarm; of those that are at most "
    f"{rule.WRONG['missed'][1]:.0%} raise none, and as many raise it more than an evaluation before the best P_win; "
    f"over-optimised: P_win at the end is more than {rule.LOSS} below its best"
)

CLAIMS = (
    RequiredClaim(
        "C1",
        "Intermediate likelihood of better completions is best",
        f"the mean P_win of evaluations whose better LLH is {_span} below the start is more than {APART} above that of those "
        f"less than {fits.EDGES[0]:g} below it, and of those {fits.EDGES[-1]:g} or more below it; within {fits.CLIP:g} of the start "
        f"a quadratic fit opens downwards and has more than {REDUCTION:.0%} less RMSE than a line",
        {"language": _INTERMEDIATE},
        paper="an inverted U; a parabola has 24.42 % (7B) and 25.78 % (35B) less RMSE than a line",
    ),
    RequiredClaim(
        "C2",
        "A larger gap between better and worse completions is not better",
        f"P_win of the run of the largest gap at the end is more than {GAP_LOSES} below the mean of the other runs, and that of the "
        f"tenth of evaluations with the largest gaps as much below the others'; that of evaluations that no other surpasses in "
        f"better LLH and in (lower) worse LLH is more than {FRONT_LOSES} below the others'",
        {"language": _GAP},
        paper="the best runs have neither the largest gap nor the best pair of likelihoods (plots alone)",
    ),
    RequiredClaim(
        "C3",
        "Lower likelihood goes with more diversity across outputs",
        f"Spearman's correlation of EAD (of a fixed number of n-grams) and better LLH is below -{SPEARMAN} for each method without an "
        "NLL term, also at equal length",
        {"language": ranks("ead", "EAD", ("", "length"), below=-SPEARMAN)},
        paper="diversity rises as likelihood falls (plots alone)",
    ),
    RequiredClaim(
        "C4",
        "Higher likelihood goes with more memorised facts",
        f"Spearman's correlation of fact accuracy and better LLH is above {SPEARMAN} for each method without an NLL term",
        {"language": ranks("facts", "fact accuracy", above=SPEARMAN)},
        paper="F1 on NaturalQuestions and TriviaQA rises with likelihood (plots alone)",
    ),
    RequiredClaim(
        "C5",
        "Entropy of the likeliest tokens rises, and then falls",
        f"with DPO of β = {' and '.join(f'{s:g}' for s in SMALL)}, its mean after {TURN[0]} to {TURN[1]} updates is above the start "
        "and its end below it",
        {"language": _TURN},
        paper="it rises and then reverses (plots alone)",
    ),
    Claim(
        "C6",
        "Mass of the likeliest tokens falls",
        "with the arm of each method that moves furthest, it is lower at the end than at the start",
        {"language": _MASS},
        paper="it shrinks, except with IPO beside an NLL term and on BinarizedPref (plots alone)",
    ),
    RequiredClaim(
        "C7",
        "An NLL term acts through likelihood alone",
        f"at the end of DPO with β = {STRONG:g} and a rate of {sweep.RATES[STRONG]}, which holds better LLH within {HELD} of the "
        f"start by itself, λ = {WEIGHTS[-1]:g} changes better LLH by less than {LLH_MOVES} and P_win by less than {P_WIN_MOVES}; with β = {WEAK:g}, P_win is more than "
        f"{TURNS} higher with λ = {WEIGHTS[1]:g} than with 0 and with {WEIGHTS[-1]:g}",
        {"language": _NLL},
        paper="a larger weight is not better; with a strong penalty it changes little (plots alone)",
    ),
    RequiredClaim(
        "C8",
        "Likelihood is not a matter of length",
        f"Pearson's correlation of better LLH and the mean length of outputs within {PEARSON} of 0, in the mean of seeds",
        {"language": [_LENGTH]},
        paper="r = -0.114 (p = 0.27) at 7B and 0.198 (p = 0.17) at 35B",
    ),
    Claim(
        "C9",
        "The stopping rule stops exactly the runs that are over-optimised (not a claim of the paper)",
        _RATES,
        {"language": [rule.rates(rule.PLAIN)], "smollm": [rule.rates(rule.PLAIN, FEW_SEEDS)]},
    ),
    Claim(
        "C10",
        f"So does the rule that waits for a fall of {rule.CHOSEN.llh_drop:g} nats (not a claim of the paper)",
        f"{_RATES}; the fall was chosen on other seeds and another language",
        {"language": [rule.rates(rule.CHOSEN)], "smollm": [rule.rates(rule.CHOSEN, FEW_SEEDS)]},
    ),
)
