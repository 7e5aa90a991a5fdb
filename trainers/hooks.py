"""The hook seam: host code with a cadence, called after a step's update."""

from collections.abc import Mapping
from typing import Protocol

from trainers.train_state import TrainState


class GivenUpError(Exception):
    """Raised by a hook that has seen the request to stop: the loop saves and ends as requested."""


class Hook(Protocol):
    """Called with the number of updates made, the state after them, and the newest host metrics.

    The metrics are those of the step before, since they are fetched one step late. What a hook
    returns is written with the run's metrics. A hook runs when `step` is a multiple of `every`, and
    after the last step. One that a stop has kept from running is run when the run goes on.
    """

    every: int

    def __call__(
        self, step: int, state: TrainState, metrics: Mapping[str, float]
    ) -> Mapping[str, float] | None: ...
