"""The hook seam: host code with a cadence, called after a step's update."""

import abc
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from espalier.trainers.batches import Feed, TrainStream
from espalier.trainers.recipe import Program
from espalier.trainers.train_state import TrainState


class HookInterruptedError(Exception):
    """Raised by a hook that a stop request interrupted: the loop saves and ends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
    """The run that a hook is made for.

    Attributes:
      path: the run's directory.
      writer: whether this process writes there; exactly one does.
      step: updates made when this process began.
      program: model, objective, mesh and shardings.
      learning_rate: number of updates made -> the rate of the next.
      should_stop: called between the parts of long work with the number of finished parts; if it returns True, the hook
        raises HookInterruptedError. Every process must call it equally often.
    """

    path: str | os.PathLike
    writer: bool
    step: int
    program: Program
    learning_rate: Callable[[int], float]
    should_stop: Callable[[int], bool] = lambda done: False


class FeedFactory(Protocol):
    """Makes the feed of a run that trains on its own samples, such as `trainers.online.rollouts.Rollouts`.

    A run calls it once, after its data are open and before its state exists.
    """

    def __call__(self, *, stream: TrainStream, program: Program, folder: str | os.PathLike) -> Feed:
        """Returns the feed, whose batches have the columns of the recipe's `abstract_batch`.

        Args:
          stream: the run's training stream, of prompts.
          folder: directory below the run's that the feed may write to.

        Raises:
          ValueError: stream, program and settings that do not fit each other.
        """


class Hook(abc.ABC):
    """Called with the number of updates made, the state after them, and the newest host metrics.

    The metrics are of the step before, since they are fetched one step late. The returned metrics are
    written with the run's. A hook runs when `step` is a multiple of `every` or one of `also_at`, and after the last step.
    Hooks skipped by a preemption run on resume.

    Attributes:
      every: updates between calls.
      also_at: steps of further calls.
      at_start: also runs before a run's first update.
      prefix: of the names of its metrics; a hook is not run again at a step for which they are written.
      ended_by: what ends the run if it does, such as its setting.
    """

    every: int
    also_at: Collection[int] = ()
    at_start: bool = False
    prefix: str = ""
    ended_by: str = "a hook"

    @property
    def ended(self) -> bool:
        """Whether it ends the run: the loop runs the other hooks and saves, as after the last step.

        A resumed run ends at once.
        """
        return False

    @abc.abstractmethod
    def __call__(
        self, step: int, state: TrainState, metrics: Mapping[str, float]
    ) -> Mapping[str, float] | None:
        """Returns metrics to write, or None."""


# Called with (run=). Without forward references, which the check of gin's types could not evaluate.
HookFactory = Callable[..., Hook]


def checked(made: object) -> Hook:
    """Returns what a factory made; raises ValueError if it is no `Hook`."""
    if not isinstance(made, Hook):
        raise ValueError(
            f"{type(made).__qualname__} is no hook: derive it from espalier.trainers.hooks.Hook."
        )
    return made


def named(**slots: HookFactory | None) -> tuple[HookFactory, ...]:
    """Returns the hook factories in the order of their slots' names, without slots that are None.

    Each method fills a slot of its own (`hooks.named.spectrum = @spectrum.Spectrum`), so that several
    can be in one run.
    """
    return tuple(hook for _, hook in sorted(slots.items()) if hook is not None)
