"""Learning rates as functions of the step. Every schedule here is pure; where one is expected, a number is a constant one.

Steps count optimiser updates from 0; update s uses the value at step s. In schedules with total_steps, warmup_steps =
None is 1 % of the updates (in `wsd`, of those before the decay). total_steps = None is the length of the run, computed once
its data are open (TRAIN_TOKENS).
`linear` with peak = None begins at the rate at which the parent run (INITIAL_CHECKPOINT_PATH) stopped.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import optax

from espalier.common.ranges import Count, Fraction, NonNegative, Size

Schedule = Callable[[int], jnp.ndarray]


@dataclasses.dataclass(frozen=True)
class Span:
    """Facts of a run that its schedule may need, known just before the first step.

    Attributes:
      stopped_at: the learning rate at which the parent run stopped; None if it did not record one.
      start_step: the first step of this run; the step of the parent's checkpoint, if the step counter continues.
    """

    total_steps: int
    stopped_at: float | None = None
    start_step: int = 0


@dataclasses.dataclass(frozen=True)
class Unspanned:
    """A schedule that depends on the run's `Span`; `span` turns it into a callable schedule."""

    make: Callable[[Span], Schedule]

    def __call__(self, step: int) -> jnp.ndarray:
        raise ValueError(
            "a schedule with total_steps = None (TRAIN_STEPS = None) has no value before the run knows "
            "its length: give total_steps if another schedule is made of it."
        )


def as_schedule(schedule: Schedule | float) -> Schedule:
    """Returns `schedule`, or a constant schedule if it is a number."""
    return schedule if callable(schedule) else constant(schedule)


def span(schedule: Schedule | float, over: Span) -> Schedule:
    """Returns `schedule`, made for the run's span if it is an `Unspanned`."""
    return schedule.make(over) if isinstance(schedule, Unspanned) else as_schedule(schedule)


def _over_the_run(schedule: Callable[..., Schedule], **settings) -> Unspanned:
    """Returns a schedule whose total_steps is that of the run."""
    return Unspanned(lambda run: schedule(total_steps=run.total_steps, **settings))


def _known_peak(peak: float | None, run: Span) -> float:
    if peak is not None:
        return peak
    if run.stopped_at is None:
        raise ValueError(
            "linear: peak = None begins at the rate at which another run stopped, but no such rate is known: "
            "set INITIAL_CHECKPOINT_PATH to a checkpoint that records its learning rate, or give peak."
        )
    return run.stopped_at


def _with_warmup(after: Schedule, peak: float, warmup_steps: int) -> Schedule:
    """Returns linear warm-up from 0 to `peak` at step `warmup_steps`, then `after` with steps counted from there."""
    if warmup_steps == 0:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps]
    )


def _warmup(name: str, total_steps: int, warmup_steps: int | None) -> int:
    """Returns `warmup_steps`, or 1 % of the updates if it is None; raises ValueError if out of range."""
    if warmup_steps is None:
        return max(min(-(-total_steps // 100), total_steps - 1), 0)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"{name}: warmup_steps = {warmup_steps} must lie in [0, total_steps = {total_steps}): lower "
            "WARMUP_STEPS (None takes one update in a hundred), or raise TRAIN_STEPS."
        )
    return warmup_steps


def constant(peak: NonNegative, *, warmup_steps: Count = 0) -> Schedule:
    """Returns a schedule: linear warm-up over `warmup_steps` updates, then constant at `peak`."""
    return _with_warmup(optax.constant_schedule(peak), peak, warmup_steps)


def linear(
    peak: NonNegative | None,
    *,
    total_steps: Size | None,
    warmup_steps: Count | None = 0,
    final: NonNegative = 0.0,
) -> Schedule:
    """Returns a schedule: warm-up, then a straight line that reaches `final` at `total_steps`.

    Args:
      peak: the highest learning rate; None for the rate at which the parent run stopped.
      total_steps, warmup_steps: see `cosine`.
      final: the learning rate at the end.
    """
    if peak is None or total_steps is None:
        return Unspanned(
            lambda run: linear(
                peak=_known_peak(peak, run),
                total_steps=run.total_steps if total_steps is None else total_steps,
                warmup_steps=warmup_steps,
                final=final,
            )
        )
    warmup_steps = _warmup("linear", total_steps, warmup_steps)
    after = optax.linear_schedule(peak, final, total_steps - warmup_steps)
    return _with_warmup(after, peak, warmup_steps)


def cosine(
    peak: NonNegative,
    *,
    total_steps: Size | None,
    warmup_steps: Count | None = 0,
    final_fraction: Fraction = 0.1,
) -> Schedule:
    """Returns a schedule: warm-up, then half a cosine down to `final_fraction` of the peak at `total_steps`.

    Args:
      peak: the highest learning rate.
      total_steps: updates of the whole schedule, warm-up included; None for the length of the run.
      warmup_steps: updates in which the rate rises linearly from 0 to `peak`; None for 1 % of all updates.
      final_fraction: the rate at the end, divided by `peak`.

    Raises:
      ValueError: the warm-up is as long as the schedule, or longer.
    """
    if total_steps is None:
        return _over_the_run(
            cosine, peak=peak, warmup_steps=warmup_steps, final_fraction=final_fraction
        )
    warmup_steps = _warmup("cosine", total_steps, warmup_steps)
    after = optax.cosine_decay_schedule(peak, total_steps - warmup_steps, alpha=final_fraction)
    return _with_warmup(after, peak, warmup_steps)


def stepwise(
    peak: NonNegative,
    *,
    total_steps: Size | None,
    at: Sequence[Fraction] = (0.3, 0.6, 0.8),
    factor: NonNegative = 0.2,
    warmup_steps: Count | None = 0,
) -> Schedule:
    """Warm-up, then `peak` times `factor` for each of the shares `at` of the run that have passed.

    The defaults are from wide ResNets (arXiv 1605.07146): epochs 60, 120 and 160 of 200.
    """
    if total_steps is None:
        return _over_the_run(stepwise, peak=peak, at=at, factor=factor, warmup_steps=warmup_steps)
    warmup_steps = _warmup("stepwise", total_steps, warmup_steps)
    if list(at) != sorted(set(at)) or not all(0 < share < 1 for share in at):
        raise ValueError(f"stepwise: at = {tuple(at)} must increase within (0, 1).")
    drops = [round(share * total_steps) for share in at]
    rates = [optax.constant_schedule(peak * factor**count) for count in range(len(drops) + 1)]
    falling = optax.join_schedules(rates, drops)
    return _with_warmup(lambda step: falling(step + warmup_steps), peak, warmup_steps)


def rsqrt(peak: NonNegative, *, warmup_steps: Count) -> Schedule:
    """peak * sqrt(warmup / max(step, warmup)), with a linear warm-up (T5 without its flat start)."""
    if warmup_steps < 1:
        raise ValueError("rsqrt: warmup_steps must be at least 1; it sets the decay's time scale.")

    def after(step):
        return peak * jnp.sqrt(warmup_steps / (step + warmup_steps))

    return _with_warmup(after, peak, warmup_steps)


def wsd(
    peak: NonNegative,
    *,
    total_steps: Size | None,
    decay_steps: Size,
    warmup_steps: Count | None = 0,
    final: NonNegative = 0.0,
) -> Schedule:
    """Returns a schedule: warm-up, constant at `peak`, linear decay (WSD of MiniCPM, arXiv 2404.06395).

    Args:
      peak, total_steps, warmup_steps: see `cosine`.
      decay_steps: the last updates, in which the rate falls linearly from `peak` to `final`.
      final: the learning rate at the end.

    Raises:
      ValueError: warm-up and decay together are longer than the schedule.
    """
    if total_steps is None:
        return _over_the_run(
            wsd, peak=peak, decay_steps=decay_steps, warmup_steps=warmup_steps, final=final
        )
    start = total_steps - decay_steps
    if start < 0 or not 0 <= (warmup_steps or 0) <= start:
        raise ValueError(
            f"wsd: warmup_steps = {warmup_steps} and decay_steps = {decay_steps} must fit into total_steps = {total_steps}: lower "
            "WARMUP_STEPS (None takes one update in a hundred) or decay_steps, or raise TRAIN_STEPS."
        )
    if warmup_steps is None:
        warmup_steps = _warmup("wsd", start, None)
    stable = constant(peak=peak, warmup_steps=warmup_steps)
    return cooldown(before=stable, start_step=start, steps=decay_steps, final=final)


def cooldown(
    *, before: Schedule | NonNegative, start_step: Count, steps: Size, final: NonNegative = 1e-6
) -> Schedule:
    """Returns a schedule that follows `before` up to `start_step`, then a straight line from its value there to `final`.

    To cool down from a checkpoint at step s, set `before` to the run's schedule and `start_step` to s. Optimiser moments
    and step then continue; only the rate changes.

    Args:
      before: a schedule, or a constant rate.
      start_step: the update with which the line begins.
      steps: updates of the line; the rate is `final` after them.
      final: the learning rate at the end.
    """
    before = as_schedule(before)
    if steps < 1:
        raise ValueError(f"cooldown: steps = {steps} must be positive.")
    decay = optax.linear_schedule(before(start_step), final, steps)
    return optax.join_schedules([before, decay], [start_step])


def continued(
    *,
    before: Schedule | NonNegative,
    start_step: Count | None = None,
    warmup_steps: Count = 0,
    scale: NonNegative = 1.0,
) -> Schedule:
    """`before` up to `start_step`, then `scale` times `before`, with a linear warm-up from 0.

    For a run that continues from transformed parameters, such as matrices decomposed into factors. start_step = None
    is the first step of the run.
    """
    before = as_schedule(before)
    if start_step is None or isinstance(before, Unspanned):
        return Unspanned(
            lambda run: continued(
                before=span(before, run),
                start_step=run.start_step if start_step is None else start_step,
                warmup_steps=warmup_steps,
                scale=scale,
            )
        )
    if warmup_steps < 0 or start_step < 0:
        raise ValueError(
            f"continued: start_step = {start_step} and warmup_steps = {warmup_steps} must not be negative."
        )

    def rate(step):
        since = jnp.asarray(step - start_step, jnp.float32)
        rise = jnp.minimum(since / warmup_steps, 1.0) if warmup_steps else 1.0
        return before(step) * jnp.where(since < 0, 1.0, scale * rise)

    return rate


def phases(*, schedules: Sequence[Schedule | NonNegative], starts: Sequence[Count]) -> Schedule:
    """Uses schedule i from step starts[i] on, with its own steps counted from 0; starts[0] is 0."""
    if len(schedules) != len(starts) or not starts or starts[0] != 0:
        raise ValueError("phases: give one start per schedule, the first of them 0.")
    if list(starts) != sorted(set(starts)):
        raise ValueError(f"phases: starts = {tuple(starts)} must increase.")
    return optax.join_schedules([as_schedule(one) for one in schedules], list(starts[1:]))
