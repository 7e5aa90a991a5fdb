"""Caps on the epochs of a source, and redistribution of a capped source's share.

A cap of c epochs on a source of r rows allows at most floor(c r) rows. The source is excluded from
the first step that would exceed its cap. The other sources of its phase then take over its share,
in proportion to their own shares. The result is an ordinary list of phases, computed before the
first step. Batches therefore remain a pure function of the step, and batches before that step do
not depend on the cap.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from espalier.common import spelling
from espalier.common.ranges import Positive
from espalier.data.stream.schedule import Schedule

OnCap = Literal["error", "redistribute", "warn"]
MaxEpochs = Positive | Mapping[str, Positive]

Phases = list[tuple[int, dict[str, float]]]


def row_limits(max_epochs: MaxEpochs | None, rows: Mapping[str, int]) -> dict[str, int]:
    """Returns {source: maximum rows to read} of the capped sources.

    Args:
        max_epochs: one cap for every source, or {source: cap}; None for no cap.
        rows: source -> rows of its plan.

    Raises:
        ValueError: a source is unknown, or a cap is not positive and finite.
    """
    if max_epochs is None:
        return {}
    caps = max_epochs if isinstance(max_epochs, Mapping) else dict.fromkeys(rows, max_epochs)
    for name, cap in caps.items():
        if name not in rows:
            raise ValueError(f"max_epochs: unknown source {name!r}; {spelling.nearest(name, rows)}")
        if not 0 < cap < math.inf:
            raise ValueError(
                f"max_epochs of {name!r} is {cap}; it must be positive and finite. For no cap, omit the source."
            )
    return {name: math.floor(cap * rows[name]) for name, cap in caps.items()}


def redistribute(
    phases: Phases, limits: Mapping[str, int], make_schedule: Callable[[Phases], Schedule]
) -> tuple[Phases, list[tuple[int, tuple[str, ...]]], int | None]:
    """Excludes each source from the first step that would exceed its limit of rows.

    Args:
        phases: (first step, {source: share}); the shares of a phase sum to 1.
        limits: source -> maximum rows; other sources are not limited.
        make_schedule: phases -> their schedule.

    Returns:
        Phases without the sources that have reached their limits; (first step without these
        sources, the sources), in order of steps; and the first step at which no source of its phase
        is left, or None.
    """
    out: Phases = []
    full: list[tuple[int, tuple[str, ...]]] = []
    for j, (start, shares) in enumerate(phases):
        last = phases[j + 1][0] if j + 1 < len(phases) else None
        excluded = {name for _, names in full for name in names}
        while True:
            remaining = {name: share for name, share in shares.items() if name not in excluded}
            if not remaining:
                return out, full, start
            if len(remaining) < len(shares):  # otherwise leave the shares bitwise unchanged
                total = sum(remaining.values())
                remaining = {name: share / total for name, share in remaining.items()}
            limited = {name: limits[name] for name in remaining if name in limits}
            reached = _reached([*out, (start, remaining)], limited, make_schedule, last)
            if reached is None:
                out.append((start, remaining))
                break
            step, sources = reached
            if step > start:
                out.append((start, remaining))
            full.append((step, sources))
            excluded.update(sources)
            start = step
    return out, full, None


def _reached(
    phases: Phases,
    limits: Mapping[str, int],
    make_schedule: Callable[[Phases], Schedule],
    last: int | None,
) -> tuple[int, tuple[str, ...]] | None:
    """Returns the first step of the last phase that would exceed a limit, and the sources concerned.

    Returns None if there is no such step before step `last`.
    """
    if not limits:
        return None
    schedule = make_schedule(phases)
    start = phases[-1][0]
    places = [schedule.sources.index(name) for name in limits]
    bounds = np.array(list(limits.values()))

    def beyond(steps: int) -> np.ndarray:
        return schedule.used(steps)[places] > bounds

    # Invariant: no limit is exceeded after `low` steps; at least one is after `high` steps.
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
