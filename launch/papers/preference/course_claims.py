"""The claims on the course of training, and on an NLL term beside DPO, with what was measured for each."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from launch.papers.preference import results
from launch.papers.preference.arms import METHODS, Arm, furthest
from launch.papers.preference.evidence import Numbers, Part, judge
from launch.papers.preference.results import Course
from launch.papers.shared.claim import Claim

SMALL = (0.01, 0.1)  # strengths of DPO whose entropy is to turn
WEAK, STRONG = 0.1, 5.0  # of DPO beside an NLL term
WEIGHTS = (
    0.0,
    0.1,
    1.0,
)  # of the NLL term at the weak one; the last against the first at the strong one
LLH_MOVES, P_WIN_MOVES = 0.02, 0.05  # at most, by an NLL term beside the strong one


def claims(every: Sequence[Course]) -> list[Claim]:
    """C5 to C7."""
    return [_entropy(every), _mass(every), _nll(every)]


def _entropy(every: Sequence[Course]) -> Claim:
    words = (
        "entropy {start:.2} bits at the start, {peak:.2} at its peak after {at:n} updates, {end:.2} at the end; the best "
        "P_win is at {best:n}"
    )
    parts = [
        _of(Arm("dpo", strength), words, _turn, lambda n: n["end"] < n["start"] < n["peak"])
        for strength in SMALL
    ]
    return Claim(
        "C5",
        "Entropy of the likeliest tokens rises, and then falls",
        f"with DPO of β = {' and '.join(f'{s:g}' for s in SMALL)}, its peak is above the start and its end below it",
        judge(every, parts),
        required=True,
    )


def _turn(one: Course) -> Numbers:
    at = int(np.argmax(one["entropy"]))
    return {
        "start": one.start("entropy"),
        "peak": one["entropy"][at],
        "at": one["step"][at],
        "end": one.end("entropy"),
        "best": one["step"][one.best],
    }


def _mass(every: Sequence[Course]) -> Claim:
    words = (
        "mass {start:.3} at the start, {lowest:.3} at its lowest after {at:n} updates, {end:.3} at the end; entropy of "
        "{entropy_start:.2} bits becomes {entropy:.2}"
    )
    parts = [
        _of(furthest(method), words, _masses, lambda n: n["end"] < n["start"]) for method in METHODS
    ]
    return Claim(
        "C6",
        "Mass of the likeliest tokens falls",
        "with the arm of each method that moves furthest, it is lower at the end than at the start",
        judge(every, parts),
    )


def _masses(one: Course) -> Numbers:
    at = int(np.argmin(one["mass"]))
    return {
        "start": one.start("mass"),
        "lowest": one["mass"][at],
        "at": one["step"][at],
        "end": one.end("mass"),
        "entropy_start": one.start("entropy"),
        "entropy": one.end("entropy"),
    }


def _nll(every: Sequence[Course]) -> Claim:
    strong = Part(
        f"β = {STRONG:g}",
        f"λ = {WEIGHTS[-1]:g} changes better LLH by {{llh:.3}} and P_win by {{p_win:.3}}",
        _difference,
        lambda n: abs(n["llh"]) <= LLH_MOVES and abs(n["p_win"]) < P_WIN_MOVES,
    )
    shown = "; ".join(
        f"λ = {weight:g}: P_win {{p{i}:.3}} at better LLH {{llh{i}:.2}}"
        for i, weight in enumerate(WEIGHTS)
    )
    weak = Part(
        f"β = {WEAK:g}", shown, _by_weight, lambda n: (n["p1"] - n["p0"]) * (n["p2"] - n["p1"]) < 0
    )
    return Claim(
        "C7",
        "An NLL term acts through likelihood alone",
        f"at the end of DPO with β = {STRONG:g}, λ = {WEIGHTS[-1]:g} changes better LLH by at most {LLH_MOVES} and P_win "
        f"by less than {P_WIN_MOVES}; with β = {WEAK:g}, P_win is not monotone in λ = "
        f"{', '.join(f'{w:g}' for w in WEIGHTS)}",
        judge(every, (strong, weak)),
        required=True,
    )


def _difference(every: Sequence[Course]) -> Numbers | None:
    without, beside = (_one(every, Arm("dpo", STRONG, w)) for w in (WEIGHTS[0], WEIGHTS[-1]))
    if without is None or beside is None:
        return None
    names = {"llh": "llh_chosen", "p_win": "p_win"}
    return {key: beside.end(name) - without.end(name) for key, name in names.items()}


def _by_weight(every: Sequence[Course]) -> Numbers | None:
    found: dict[str, float] = {}
    for i, weight in enumerate(WEIGHTS):
        one = _one(every, Arm("dpo", WEAK, weight))
        if one is None:
            return None
        found |= {f"p{i}": one.end("p_win"), f"llh{i}": one.end("llh_chosen")}
    return found


def _of(
    arm: Arm, words: str, numbers: Callable[[Course], Numbers], holds: Callable[[Numbers], bool]
) -> Part:
    """A condition on one arm."""
    return Part(arm.label, words, functools.partial(_numbers, arm, numbers), holds)


def _numbers(
    arm: Arm, numbers: Callable[[Course], Numbers], every: Sequence[Course]
) -> Numbers | None:
    one = _one(every, arm)
    return None if one is None else numbers(one)


def _one(every: Sequence[Course], arm: Arm) -> Course | None:
    """The run of an arm among those of one seed."""
    return next(iter(results.find(every, arm)), None)
