"""How often sources may be read, and who gets the share of one that has been read as often as it may.

A cap of c epochs on a source of r rows is floor(c r) rows, and never one more. From the first step on that
would read further, the source is left out and the others of its phase share what it had pro rata. That is
a list of phases like any other, found by arithmetic before the first step, so that batches remain a pure
function of the step and those before it are what they would be without a cap.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import numpy as np

from data.stream.schedule import Schedule
from data.text.sources import names

OnCap = Literal["error", "redistribute", "warn"]
ON_CAP = get_args(OnCap)
MaxEpochs = float | Mapping[str, float]

Phases = list[tuple[int, dict[str, float]]]


def row_limits(max_epochs: MaxEpochs | None, rows: Mapping[str, int]) -> dict[str, int]:
    """The most rows that may be read of each capped source.

    Args:
        max_epochs: of every source, or by source; None for no cap.
        rows: of each source's plan.

    Raises:
        ValueError: an unknown source, or a cap that is not above 0.
    """
    if max_epochs is None:
        return {}
    caps = max_epochs if isinstance(max_epochs, Mapping) else dict.fromkeys(rows, max_epochs)
    for name, cap in caps.items():
        if name not in rows:
            raise ValueError(
                f"max_epochs: unknown source {name!r}; {names.nearest(name, tuple(rows))}"
            )
        if not 0 < cap < math.inf:
            raise ValueError(
                f"max_epochs of {name!r} is {cap}; it must be above 0 (leave the source out for no cap)."
            )
    return {name: math.floor(cap * rows[name]) for name, cap in caps.items()}


@dataclasses.dataclass(frozen=True)
class Redistributed:
    """Phases in which no source is read beyond its limit.

    Attributes:
        phases: (first step, share of each source that is still read).
        full: (step from which on they are left out, sources) in order of steps.
        end: the first step for which no source is left; None where there is no such step.
    """

    phases: Phases
    full: list[tuple[int, tuple[str, ...]]]
    end: int | None


def redistribute(
    phases: Phases, limits: Mapping[str, int], dealt: Callable[[Phases], Schedule]
) -> Redistributed:
    """Leaves each source out from the step on that would read more rows of it than its limit.

    Args:
        phases: (first step, share of each source), the shares of a phase summing to 1.
        limits: rows by source; sources without one are not limited.
        dealt: makes the schedule of phases.
    """
    out: Phases = []
    full: list[tuple[int, tuple[str, ...]]] = []
    for j, (start, shares) in enumerate(phases):
        last = phases[j + 1][0] if j + 1 < len(phases) else None
        done = {name for _, names in full for name in names}
        while True:
            kept = {name: share for name, share in shares.items() if name not in done}
            if not kept:
                return Redistributed(out, full, start)
            if len(kept) < len(shares):  # otherwise they are left as they are, to the last bit
                whole = sum(kept.values())
                kept = {name: share / whole for name, share in kept.items()}
            limited = {name: limits[name] for name in kept if name in limits}
            reached = _reached([*out, (start, kept)], limited, dealt, last)
            if reached is None:
                out.append((start, kept))
                break
            step, sources = reached
            if step > start:
                out.append((start, kept))
            full.append((step, sources))
            done.update(sources)
            start = step
    return Redistributed(out, full, None)


def _reached(
    phases: Phases,
    limits: Mapping[str, int],
    dealt: Callable[[Phases], Schedule],
    last: int | None,
) -> tuple[int, tuple[str, ...]] | None:
    """The first step of the last phase that would read beyond a limit, and of which sources.

    None if there is no such step before step `last`.
    """
    if not limits:
        return None
    schedule = dealt(phases)
    start = phases[-1][0]
    places = [schedule.sources.index(name) for name in limits]
    bounds = np.array(list(limits.values()))

    def beyond(steps: int) -> np.ndarray:
        return schedule.used(steps)[places] > bounds

    # Nothing is beyond after `low` steps, something is after `high`.
    low, high = start, start + 1
    while not beyond(high).any():
        low, high = high, start + 2 * (high - start)
        if last is not None and low >= last:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(middle).any() else (middle, high)
    if last is not None and low >= last:
        return None
    sources = tuple(name for name, over in zip(limits, beyond(high), strict=True) if over)
    return low, sources
