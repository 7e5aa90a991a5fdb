"""A stopping rule: signs of over-optimisation that need no reward (arXiv 2410.11677, section 5).

The paper names two signs, falling entropy and falling mass of the likeliest tokens, but no thresholds. The thresholds
here are this project's choice.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence

from espalier.common.ranges import Fraction, NonNegative, Size
from espalier.trainers.telemetry import metric_writers

PREFIX = "indicators/"  # of the names of the metrics
_MEASURED = ("entropy", "mass", "llh_chosen")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """The measurements of one evaluation that the rule reads.

    Attributes:
      step: number of updates so far.
      entropy, mass: entropy and mass of the likeliest tokens, at generated positions.
      llh_chosen: mean log-likelihood per token of held-out chosen completions.
    """

    step: int
    entropy: float
    mass: float
    llh_chosen: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alarm:
    """The first evaluation at which the rule raises an alarm, the one before it, and the reason, as a clause."""

    step: int
    before: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """A pure function of the readings of a run, computed on their exponential moving averages.

    The rule raises an alarm in two cases. Case 1: entropy has dropped in `drops` consecutive evaluations, is below
    (1 - entropy_drop) times its maximum so far, and the likelihood of chosen completions still falls. Case 2: the mass
    is more than `mass_drop` below the mass of the first reading. In both cases the likelihood of chosen completions must
    also lie at least `llh_drop` below that of the first reading: DPO's always falls a little, in healthy runs too.

    Attributes:
      smoothing: weight of the previous average in each average; with 0 the readings are not averaged.
      drops: number of consecutive evaluations with falling entropy.
      entropy_drop: drop of the entropy, as a share of its maximum.
      mass_drop: drop of the mass, in probability.
      llh_drop: drop of the likelihood of chosen completions, in nats per token; 0 does not ask for one.
    """

    smoothing: Fraction = 0.5
    drops: Size = 3
    entropy_drop: Fraction = 0.03
    mass_drop: Fraction = 0.02
    llh_drop: NonNegative = 0.0

    def __post_init__(self):
        if not 0 <= self.llh_drop < math.inf:
            raise ValueError(f"StoppingRule.llh_drop = {self.llh_drop} must be 0 or positive.")
        if self.drops < 1:
            raise ValueError(f"StoppingRule.drops = {self.drops} must be at least 1.")
        for name in ("smoothing", "entropy_drop", "mass_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"StoppingRule.{name} = {getattr(self, name)} must be in [0, 1).")

    def __call__(self, readings: Sequence[Reading]) -> Alarm | None:
        """Returns the first alarm of a run's readings, by step from 0, or None; later readings never change an alarm."""
        entropies, masses, likelihoods = (
            self._averages([getattr(reading, name) for reading in readings]) for name in _MEASURED
        )
        for i in range(1, len(readings)):
            if self.llh_drop and likelihoods[i] > likelihoods[0] - self.llh_drop:
                continue
            told = self._told(entropies[i], readings[i].entropy)
            reason = self._entropy_falls(entropies[: i + 1], likelihoods[: i + 1], told)
            if reason is None and masses[i] < masses[0] - self.mass_drop:
                reason = (
                    f"the mass of the likeliest tokens is {self._told(masses[i], readings[i].mass)}, "
                    f"{100 * (masses[0] - masses[i]):.1f} points below its first value"
                )
            if reason is not None:
                return Alarm(step=readings[i].step, before=readings[i - 1].step, reason=reason)
        return None

    def _averages(self, values: Sequence[float]) -> list[float]:
        weight = self.smoothing
        return [*itertools.accumulate(values, lambda mean, x: weight * mean + (1 - weight) * x)]

    def _told(self, average: float, read: float) -> str:
        return f"smoothed {average:.3f} (read {read:.3f})" if self.smoothing else f"{average:.3f}"

    def _entropy_falls(
        self, entropies: Sequence[float], likelihoods: Sequence[float], told: str
    ) -> str | None:
        last, highest = entropies[-1], max(entropies)
        recent = entropies[-self.drops - 1 :]
        in_a_row = len(recent) > self.drops and all(
            after < before for before, after in zip(recent, recent[1:], strict=False)
        )
        far = last < (1 - self.entropy_drop) * highest
        if in_a_row and far and likelihoods[-1] < likelihoods[-2]:
            return (
                f"the entropy of the likeliest tokens has dropped {self.drops} evaluations in a row, to {told} "
                f"bits, {100 * (1 - last / highest):.1f} % below its maximum, while the likelihood of chosen "
                "completions still falls"
            )
        return None


Rule = Callable[[Sequence[Reading]], Alarm | None]


class Monitor:
    """The readings of a run so far, and `alarm`, the rule's alarm for them or None."""

    def __init__(self, rule: Rule, readings: Sequence[Reading] = ()):
        self._rule, self._readings = rule, list(readings)
        self.alarm = rule(self._readings)

    @property
    def first_step(self) -> int | None:
        """Step of the first reading, or None."""
        return self._readings[0].step if self._readings else None

    def add(self, step: int, indicators: Mapping[str, float]) -> Alarm | None:
        """Adds a reading and returns the alarm if this reading raises it; drops readings of later steps, after a rollback."""
        before = [reading for reading in self._readings if reading.step < step]
        self._readings = [*before, _reading(step, indicators)]
        previous, self.alarm = self.alarm, self._rule(self._readings)
        return self.alarm if previous is None else None

    @classmethod
    def recovered(cls, rule: Rule, metrics: str | os.PathLike, step: int) -> "Monitor":
        """Returns a monitor with the readings in metrics.jsonl up to `step`, where the run resumes."""
        path = os.fspath(metrics)
        if not os.path.exists(path):
            return cls(rule)
        by_step = {
            row["step"]: {name.removeprefix(PREFIX): value for name, value in row.items()}
            for row in metric_writers.rows_in_force(path)
            if f"{PREFIX}entropy" in row and row["step"] <= step
        }
        return cls(rule, [_reading(step, by_step[step]) for step in sorted(by_step)])


def _reading(step: int, indicators: Mapping[str, float]) -> Reading:
    return Reading(step=step, **{name: indicators[name] for name in _MEASURED})
