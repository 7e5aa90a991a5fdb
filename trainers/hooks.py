"""The hook seam: host code with a cadence, called after a step's update."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Protocol

from trainers.recipe import Program
from trainers.train_state import TrainState


class GivenUpError(Exception):
    """Raised by a hook that has seen the request to stop: the loop saves and ends as requested."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a hook may know of the run it is made for.

    Attributes:
      path: the run's directory.
      writer: whether this process writes there, as one of them does.
      step: updates made when this process began.
      program: model, objective, mesh and shardings.
      learning_rate: of the update after so many.
      give_up: asked between two parts of long work, with the number of those done, whether to raise GivenUpError;
        every process asks alike.
    """

    path: str | os.PathLike
    writer: bool
    step: int
    program: Program
    learning_rate: Callable[[int], float]
    give_up: Callable[[int], bool] = lambda done: False


class Hook(Protocol):
    """Called with the number of updates made, the state after them, and the newest host metrics.

    The metrics are those of the step before, since they are fetched one step late. What a hook
    returns is written with the run's metrics. A hook runs when `step` is a multiple of `every`, and
    after the last step. One that a stop has kept from running is run when the run goes on. With
    `at_start` it also runs before a run's first update. Where `ended` is true, the loop runs the other hooks,
    saves and is done, as after the last step; a run that goes on from there ends at once. A hook whose metrics
    begin with `prefix` is not run again for a step that they are written for.
    """

    every: int
    at_start: bool = False
    ended: bool = False
    prefix: str = ""

    def __call__(
        self, step: int, state: TrainState, metrics: Mapping[str, float]
    ) -> Mapping[str, float] | None: ...


# What gin binds in train.hooks: called with (run=). No forward reference: gin_types could not evaluate it elsewhere.
HookFactory = Callable[..., Hook]
