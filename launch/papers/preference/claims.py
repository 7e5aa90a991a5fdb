"""The claims on likelihood and quality, and how each is measured.

Only the paper's methods are judged, and beside them the stopping rule of this project (rule.py).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.preference import experiment, numbers, rule
from espalier.launch.papers.preference.numbers import (
    DIRECT,
    METHODS,
    Arm,
    Course,
    Number,
    Runs,
    arms_of,
)
from espalier.launch.papers.shared.claim import Effect, Measure, Planned
from espalier.launch.papers.shared.page import Prose
from espalier.trainers.preference.indicators.alarm import StoppingRule

_PROSE = Prose.of(__name__)

SAVED = 10.0  # per cent of a line's RMSE
LOST_NEAR, LOST_FAR = 0.25, 0.5  # shares of the gain in the middle
GAP_LOSES = 0.05  # of P_win
LARGE = 0.9  # quantile of the gap above which it is large
DIVERSITY = 0.02  # of EAD
MEMORY = 0.5  # Spearman's correlation with better LLH
RISES, TURNS = 0.05, -0.05  # bits
WEAK = 0.1  # of DPO beside an NLL term
WEIGHTS = tuple(weight for weight in experiment.DPO[WEAK] if weight)
NO_WORSE, SAME = 0.02, 0.05  # of P_win
PEARSON = 0.2
SKILL = 0.5  # of a stopping rule; 0 is that of one that never speaks
# Values before the first update between which there is room for a change.
ROOM = {"entropy": (0.1, 3.2), "mass": (0.1, 0.98), "ead": (0.05, 1.0), "facts": (0.9, np.inf)}
_WORDS = {"ead": "EAD", "facts": "fact accuracy"}

_DIRECT = tuple(DIRECT.values())
_FURTHEST = tuple(arms_of(method)[0] for method in METHODS)
_TURNING = _FURTHEST[:2]  # the paper's hinge may rise throughout
_NLL = tuple(Arm("dpo", WEAK, weight) for weight in (0.0, *WEIGHTS))


def effect(
    what: str,
    number: Number,
    arms: Sequence[Arm] = _DIRECT,
    *,
    room: str = "",
    gains: bool = False,
    **settings: Any,
) -> Measure:
    """Returns a measure whose effect is one number per seed, from the runs of each seed that has all of the arms.

    A seed for which the number is None has no value.

    Args:
      what: the number in words.
      number: of the runs of one seed.
      arms: that are read, of those that the part has.
      room: a value that must be able to change; empty for none.
      gains: whether there is no verdict unless P_win rises.
      **settings: further fields of Effect.
    """

    def measure(runs: Runs, where: str) -> list[Effect]:
        groups = runs.complete(arms)
        known = {seed: number(mine) for seed, mine in groups.items()}
        values = {seed: float(x) for seed, x in known.items() if x is not None}
        why = no_room(room, groups) if room else no_gain(groups) if gains else ""
        if not values and not why:
            return []
        return [Effect(where=where, what=what, by_seed=values, unmet=why, **settings)]

    return measure


def no_room(name: str, groups: Mapping[int, Sequence[Course]]) -> str:
    """Returns why a value cannot change: its mean before the first update is at an end of its range; else ''."""
    starts = [mine[0].start(name) for mine in groups.values()]
    if not starts or ROOM[name][0] < np.mean(starts) < ROOM[name][1]:
        return ""
    return f"{_WORDS.get(name, name)} is {np.mean(starts):.2f} before the first update"


def no_gain(groups: Mapping[int, Sequence[Course]]) -> str:
    """Returns why no share of a gain can be judged: P_win hardly rises above its start at any likelihood; else ''."""
    gains = [x for mine in groups.values() if (x := numbers.gain(mine)) is not None]
    if not gains or np.mean(gains) >= numbers.LEAST_GAIN:
        return ""
    return f"P_win in the middle is {np.mean(gains):.3f} above the start"


def ranks(
    score: str, within: float = np.inf, beside: str = "", methods: Sequence[str] = tuple(METHODS)
) -> Measure:
    """Returns a measure of Spearman's correlation of a score with the better completions' LLH, averaged over methods."""
    labels = [METHODS[method][0] for method in methods]
    of = "mean of methods" if len(labels) > 1 else labels[0]
    span = "" if np.isinf(within) else f", within {within:g} nats of the start"
    fixed = f", at equal {beside}" if beside else ""
    arms = [arm for method in methods for arm in arms_of(method) if not arm.nll]
    return effect(
        f"Spearman's correlation of {_WORDS[score]} and better LLH, {of}{span}{fixed}",
        functools.partial(numbers.mean_spearman, score, methods, within, beside),
        arms,
        room=score,
        digits=2,
    )


def _diversity(methods: Sequence[str] = tuple(METHODS)) -> Measure:
    of = "mean of methods" if len(methods) > 1 else METHODS[methods[0]][0]
    low, high = numbers.FIRST
    return effect(
        f"EAD where better LLH is {low:g} to {high:g} nats below its start, minus at the start, {of}",
        functools.partial(numbers.first_rise, "ead", methods),
        [arm for method in methods for arm in arms_of(method) if not arm.nll],
        room="ead",
    )


def each(
    name: str, number: Callable[[str, Sequence[Course]], float | None], what: str, **more: Any
) -> list[Measure]:
    """Returns a measure for each method: `number` of the values called `name` in the run of its arm that moves furthest."""
    return [
        effect(f"{what}, {arm.label}", functools.partial(number, name), (arm,), **more)
        for arm in _FURTHEST
    ]


_low, _high = numbers.MIDDLE
_first, _clip = numbers.FIRST[1], numbers.CLIP
_moved = f"{numbers.MOVED[0]:g} to {_clip:g} nats"
SAVES = effect(
    "RMSE that a parabola saves over a line", numbers.saved, gains=True, unit="%", digits=1
)
_lost_near, _lost_far = (
    effect(
        f"share of the middle's gain in P_win that is missing {words}",
        functools.partial(numbers.lost, *bounds),
        gains=True,
        digits=2,
    )
    for words, bounds in (
        (f"less than {numbers.NEAR[1]:g} nats below the start", numbers.NEAR),
        (f"{_clip:g} nats or more below it", numbers.FAR),
    )
)
_rises = "where better LLH is " + _moved + " below its start, minus at the start"
_bits = {"room": "entropy", "unit": "bits"}
_later = "at the end minus where better LLH is " + _moved + " below its start"
_ratio = "P_win at the end, λ = {} less λ = {}, β = " + f"{WEAK:g}"


def _skill(rule_: StoppingRule) -> Measure:
    return effect(
        "over-optimised runs that are stopped in time, minus other runs with an alarm (shares), "
        + rule.name(rule_),
        functools.partial(rule.skill, rule_),
        digits=2,
    )


def _kinds(rule_: StoppingRule) -> list[Measure]:
    return [
        effect(words, functools.partial(rule.wrong_kind, kind, rule_))
        for kind, (_, words) in rule.WRONG.items()
    ]


_OLD = "the same number at seeds 10 to 14 of the earlier language"
CLAIMS = (
    _PROSE.claim(
        "C1a",
        "language",
        SAVES,
        above=SAVED,
        planned=Planned(sd=6.0, expected=20.0, source=f"{_OLD} (4.4), and seed 0"),
        required=True,
        secondary={
            "language": [
                effect("quadratic term of the fit", numbers.curvature),
                effect("gain in P_win in the middle", numbers.gain),
            ],
            "large": [SAVES],
        },
    ),
    _PROSE.claim(
        "C1b",
        "language",
        _lost_near,
        above=LOST_NEAR,
        planned=Planned(sd=0.08, expected=0.5, source=f"{_OLD} (0.04), and seed 0"),
        required=True,
        secondary={"large": [_lost_near]},
    ),
    _PROSE.claim(
        "C1c",
        "language",
        _lost_far,
        above=LOST_FAR,
        planned=Planned(
            sd=0.45,
            expected=1.3,
            source="seeds 10 to 14 of the earlier language (0.08 of P_win, of a gain of 0.2), and seed 0",
        ),
        required=True,
        secondary={"large": [_lost_far]},
    ),
    _PROSE.claim(
        "C2",
        "language",
        effect(
            "P_win at the end, other runs minus the run of the largest gap",
            numbers.others_less_largest_gap,
        ),
        above=GAP_LOSES,
        planned=Planned(sd=0.1, expected=0.25, source=f"{_OLD}, and seed 0"),
        required=True,
        secondary={
            "language": [
                effect(
                    "P_win, other evaluations minus the tenth with the largest gaps",
                    functools.partial(numbers.others_less_large_gaps, LARGE),
                ),
                effect(
                    "P_win, other evaluations minus those that none surpasses in both likelihoods",
                    numbers.others_less_front,
                ),
            ]
        },
    ),
    _PROSE.claim(
        "C3",
        "language",
        _diversity(),
        above=DIVERSITY,
        planned=Planned(sd=0.02, expected=0.055, source=f"{_OLD}, and seed 0"),
        required=True,
        secondary={
            "language": [
                *(_diversity((method,)) for method in METHODS),
                ranks("ead", _first),
                ranks("ead", _first, "length"),
                ranks("ead", _clip),
                ranks("ead"),
            ]
        },
    ),
    _PROSE.claim(
        "C4",
        "language",
        ranks("facts"),
        above=MEMORY,
        planned=Planned(sd=0.1, expected=0.9, source=f"{_OLD} (0.07), and seed 0"),
        required=True,
        secondary={
            "language": [
                *(ranks("facts", methods=(method,)) for method in METHODS),
                ranks("facts", _clip),
            ]
        },
    ),
    _PROSE.claim(
        "C5a",
        "language",
        effect(f"entropy {_rises}", functools.partial(numbers.rise, "entropy"), _TURNING, **_bits),
        above=RISES,
        planned=Planned(sd=0.06, expected=0.2, source=f"{_OLD}, and seed 0"),
        required=True,
        secondary={
            "language": [
                *each("entropy", numbers.rise, f"entropy {_rises}", **_bits),
                *each(
                    "entropy_chosen",
                    numbers.rise,
                    f"entropy on better completions {_rises}",
                    unit="bits",
                ),
            ]
        },
    ),
    _PROSE.claim(
        "C5b",
        "language",
        effect(f"entropy {_later}", functools.partial(numbers.turn, "entropy"), _TURNING, **_bits),
        below=TURNS,
        planned=Planned(sd=0.2, expected=-0.36, source=f"{_OLD}, and seed 0"),
        required=True,
        least=-TURNS,
        secondary={"language": each("entropy", numbers.turn, f"entropy {_later}", **_bits)},
    ),
    _PROSE.claim(
        "C6",
        "language",
        effect(f"mass {_rises}", functools.partial(numbers.rise, "mass"), _FURTHEST, room="mass"),
        below=0.0,
        planned=Planned(sd=0.02, expected=-0.03, source=f"{_OLD}, and seed 0"),
        secondary={
            "language": [
                *each("mass", numbers.rise, f"mass {_rises}", room="mass"),
                *each("mass", numbers.turn, f"mass {_later}", room="mass"),
                *each("mass_chosen", numbers.rise, f"mass on better completions {_rises}"),
            ]
        },
    ),
    _PROSE.claim(
        "C7a",
        "language",
        effect(
            _ratio.format(*(f"{weight:g}" for weight in WEIGHTS)),
            functools.partial(numbers.difference, "p_win", *_NLL[1:]),
            _NLL[1:],
        ),
        above=-NO_WORSE,
        planned=Planned(sd=0.012, expected=0.0, source=f"{_OLD} (0.009)"),
        secondary={
            "language": [
                effect(
                    _ratio.format(f"{WEIGHTS[0]:g}", "0"),
                    functools.partial(numbers.difference, "p_win", _NLL[1], _NLL[0]),
                    _NLL[:2],
                )
            ]
        },
    ),
    _PROSE.claim(
        "C7b",
        "language",
        effect(
            "P_win at equal likelihood, DPO with an NLL term minus DPO without",
            numbers.beside_nll,
            arms_of("dpo"),
        ),
        above=-SAME,
        below=SAME,
        planned=Planned(sd=0.015, expected=0.015, source=f"{_OLD} (0.011), and seed 0"),
    ),
    _PROSE.claim(
        "C8",
        "language",
        effect(
            f"Pearson's correlation of better LLH and length, within {_clip:g} nats of the start",
            numbers.length_link,
            digits=2,
        ),
        above=-PEARSON,
        below=PEARSON,
        planned=Planned(sd=0.1, expected=0.0, source=f"{_OLD} (0.07)"),
    ),
    _PROSE.claim(
        "C9",
        "language",
        _skill(rule.PLAIN),
        above=SKILL,
        planned=Planned(sd=0.36, expected=0.9, source=_OLD),
        control=True,
        secondary={"language": _kinds(rule.PLAIN)},
    ),
    _PROSE.claim(
        "C10",
        "language",
        _skill(rule.CHOSEN),
        above=SKILL,
        planned=Planned(sd=0.25, expected=0.8, source=f"{_OLD} (0.06), and seed 0"),
        control=True,
        secondary={"language": _kinds(rule.CHOSEN)},
    ),
)
