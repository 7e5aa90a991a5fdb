"""A reward that needs no model, and an alarm that needs no reason."""

import dataclasses

import numpy as np

from espalier.trainers.preference.indicators.alarm import Alarm


@dataclasses.dataclass(frozen=True)
class Even:
    """The share of a completion's bytes that have an even id."""

    def __call__(self, completions):
        shares = [np.mean([id % 2 == 0 for id in c.tokens] or [0.0]) for c in completions]
        return np.array(shares, np.float32)


@dataclasses.dataclass(frozen=True)
class AlarmAt:
    """A rule that speaks at a step, in place of `StoppingRule`."""

    step: int

    def __call__(self, readings):
        steps = [reading.step for reading in readings]
        if self.step not in steps:
            return None
        before = steps[steps.index(self.step) - 1]
        return Alarm(step=self.step, before=before, reason="it is time")
