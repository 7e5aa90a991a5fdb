"""Computes which source each row of a batch comes from, and its position in that source.

Slots (rows of batches) are assigned to sources by error diffusion. Every slot adds each source's
share to that source's deficit; the source with the largest deficit gets the slot, and its deficit
is reduced. With integer shares q that sum to D, the deficits return to zero after exactly D slots.
One period is therefore tabulated, and any slot of any step is computed by arithmetic. A phase
changes the shares from a specified step on. Phases are integers on the host, so no compiled train
step depends on them.

A cap of c epochs on a source of r rows allows at most floor(c r) rows. The source is excluded from the first step that would
exceed its cap (`redistribute`). The other sources of its phase then take over its share, in proportion to their own shares. The
result is an ordinary list of phases, computed before the first step. Batches therefore remain a pure function of the step, and
batches before that step do not depend on the cap.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from espalier.common import spelling
from espalier.common.ranges import Positive, check_choice

Interleaving = Literal["error_diffusion", "random"]
OnCap = Literal["error", "redistribute", "warn"]
MaxEpochs = Positive | Mapping[str, Positive]
Phases = list[tuple[int, dict[str, float]]]

# The period is at least 2^16 slots, which bounds the absolute error of any share by 2^-17, and at
# most 2^20, which takes about a second to tabulate. In between, it is chosen so that the relative
# error of every share is small too.
_MIN_PERIOD = 2**16
_MAX_PERIOD = 2**20
_RELATIVE_ERROR = 1e-3
_CANDIDATES = 4096
_MOST_ROWS = 2**62  # that positions in 64 bits count


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Returns integers nearest to `shares * total` that sum to `total`; zero shares stay zero."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def integer_shares(shares: Sequence[float], sources: Sequence[str]) -> np.ndarray:
    """Returns integer row shares q that approximate real shares; their sum D is the period.

    Candidates for D are the periods in which the source with the smallest positive share gets a
    whole number of rows. The function takes the best candidate up to 2^17 if the relative error of
    every positive share is at most 0.1 %, otherwise the best candidate up to 2^20.

    Raises:
        ValueError: a positive share is so small that it would never be read.
    """
    parts = np.asarray(shares, np.float64)
    parts = parts / parts.sum()
    positive = parts > 0
    smallest = parts[positive].min()
    if smallest * _MAX_PERIOD < 1:
        name = sources[int(np.flatnonzero(parts == smallest)[0])]
        raise ValueError(
            f"The weight of source {name!r} is a share of {smallest:.3g} of the rows, less than one row "
            f"in {_MAX_PERIOD}, and would round to zero. Raise the weight, or set it to 0 to exclude "
            "the source."
        )
    best = None
    for limit in (2 * _MIN_PERIOD, _MAX_PERIOD):
        first = int(np.ceil(_MIN_PERIOD * smallest))
        last = max(first, int(limit * smallest))
        multiples = np.unique(np.linspace(first, last, _CANDIDATES).astype(np.int64))
        periods = np.clip(np.rint(multiples / smallest), _MIN_PERIOD, _MAX_PERIOD)
        exact = periods[:, None] * parts[positive]
        errors = np.abs(np.rint(exact) / exact - 1).max(axis=1)
        best = int(np.argmin(errors))
        if errors[best] <= _RELATIVE_ERROR:
            break
    return largest_remainder(parts, int(periods[best]))


def diffuse(counts: np.ndarray, slots: int) -> np.ndarray:
    """Returns the source of each of the first `slots` slots by error diffusion.

    The source with the largest deficit gets a slot; of equal ones, the one with the lowest index.
    """
    period = int(counts.sum())
    deficits = np.zeros(len(counts), np.int64)
    sources = np.empty(slots, np.int32)
    for slot in range(slots):
        deficits += counts
        chosen = deficits.argmax()
        deficits[chosen] -= period
        sources[slot] = chosen
    return sources


def shuffle_period(counts: np.ndarray, slots: int, seed: int) -> np.ndarray:
    """Returns the source of each of the first `slots` slots of a period in random order.

    For comparison with samplers that draw each row's source independently. Sources are drawn without
    replacement, so that counts are exact over whole periods.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.permutation(np.repeat(np.arange(len(counts), dtype=np.int32), counts))[:slots]


def _occurrences(sources: np.ndarray, num_sources: int) -> np.ndarray:
    """Returns, for every slot, the number of earlier slots with the same source."""
    order = np.argsort(sources, kind="stable")
    counts = np.bincount(sources, minlength=num_sources)
    earlier = np.empty(len(sources), np.int64)
    earlier[order] = np.arange(len(sources)) - np.repeat(np.cumsum(counts) - counts, counts)
    return earlier


@functools.lru_cache(maxsize=64)
def _table(
    counts: tuple[int, ...], slots: int, interleaving: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    shares = np.array(counts, np.int64)
    if interleaving == "random":
        sources = shuffle_period(shares, slots, seed)
    else:
        sources = diffuse(shares, slots)
    return sources, _occurrences(sources, len(counts))


@dataclasses.dataclass(frozen=True)
class _Phase:
    start: int
    shares: np.ndarray  # q, int64, sums to the period
    base: np.ndarray  # rows of each source used before this phase
    sources: np.ndarray  # source of each slot of the period (only slots that the phase reaches)
    earlier: np.ndarray  # uses of that source in earlier slots of the period

    def used(self, slots: int) -> np.ndarray:
        """Returns the rows of each source used in the first `slots` slots of this phase."""
        periods, rest = divmod(slots, int(self.shares.sum()))
        return periods * self.shares + np.bincount(self.sources[:rest], minlength=len(self.shares))


class Schedule:
    """Assigns the rows of every step to sources, as a pure function of (step, row).

    Args:
        phases: (first step, real row share of each source) in order of steps, the first at 0.
        sources: names of the sources, for messages.
        batch_size: rows per step.
        interleaving: 'error_diffusion' or 'random' (see `shuffle_period`).
        seed: seed of the random interleaving; error diffusion has no randomness.
        first_rows: rows of each source used before step 0, for example by an earlier run.
    """

    def __init__(
        self,
        phases: Sequence[tuple[int, Sequence[float]]],
        *,
        sources: Sequence[str],
        batch_size: int,
        interleaving: str = "error_diffusion",
        seed: int = 0,
        first_rows: Sequence[int] | None = None,
    ):
        check_choice("interleaving", interleaving, Interleaving)
        self.batch_size = batch_size
        self.sources = tuple(sources)
        self.starts = [start for start, _ in phases]  # the first step of every phase
        self._phases: list[_Phase] = []
        base = np.array([0] * len(sources) if first_rows is None else first_rows, np.int64)
        for j, (start, weights) in enumerate(phases):
            shares = integer_shares(weights, sources)
            slots = int(shares.sum())
            if j + 1 < len(phases):
                slots = min(slots, (self.starts[j + 1] - start) * batch_size)
            key = seed if interleaving == "random" else 0
            table = _table(tuple(shares.tolist()), slots, interleaving, key)
            phase = _Phase(start, shares, base, *table)
            self._phases.append(phase)
            if j + 1 < len(phases):
                base = base + phase.used((self.starts[j + 1] - start) * batch_size)

    def locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (source index, position in the source) of rows [lo, hi) of the batch of `step`."""
        phase, before = self._phase(step)
        slots = before + np.arange(lo, hi, dtype=np.int64)
        periods, places = np.divmod(slots, phase.shares.sum())
        sources = phase.sources[places]
        positions = phase.base[sources] + periods * phase.shares[sources] + phase.earlier[places]
        return sources, positions

    def used(self, step: int) -> np.ndarray:
        """Returns the rows of each source used before `step`, including `first_rows`."""
        phase, before = self._phase(step)
        return phase.base + phase.used(before)

    def shares(self, step: int) -> np.ndarray:
        """Returns the row shares at `step`, exactly as scheduled; they sum to 1."""
        shares = self._phase(step)[0].shares
        return shares / shares.sum()

    def _phase(self, step: int) -> tuple[_Phase, int]:
        """Returns the phase of a step, and the rows from its beginning up to the step."""
        if not 0 <= step < _MOST_ROWS // self.batch_size:
            most = f"below {_MOST_ROWS // self.batch_size:,}, from which on 64 bits do not count the rows"
            raise ValueError(f"Step {step:,} must not be negative, and {most}.")
        phase = self._phases[bisect.bisect_right(self.starts, step) - 1]
        return phase, (step - phase.start) * self.batch_size


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
        if (last is not None and low >= last) or high >= _MOST_ROWS // schedule.batch_size:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(middle).any() else (middle, high)
    if last is not None and low >= last:
        return None
    sources = tuple(name for name, over in zip(limits, beyond(high), strict=True) if over)
    return low, sources
