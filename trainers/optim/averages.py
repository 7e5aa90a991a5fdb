"""Averages of the parameters that are evaluated, saved for use beside the trained ones, and exported."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from espalier.trainers import trainable
from espalier.trainers.extensions import StepExtension, Update
from espalier.trainers.optim.rounding import Rounded
from espalier.trainers.train_state import AVERAGE

# (optimiser's state, trained parameters) -> the parameters to evaluate and to release
Averaged = Callable[[Any, Any], Any]


class _Average(StepExtension):
    """An average that begins with the parameters."""

    name = AVERAGE
    like_params = True

    def init(self, params: Any, mask: Any) -> Any:
        """Returns copies of the parameters: float32 where they are trained.

        In bfloat16 an average stops short of its target: the step (1 - decay) * (p - e) is rounded away.
        """

        def copy(leaf, trained=True):
            wide = trained and jnp.issubdtype(leaf.dtype, jnp.floating)
            dtype = jnp.promote_types(leaf.dtype, jnp.float32) if wide else leaf.dtype
            return jnp.array(leaf, dtype)

        return jax.tree.map(copy, params, *(() if mask is None else (mask,)))


@dataclasses.dataclass(frozen=True)
class MovingAverage(_Average):
    """An exponential moving average.

    Attributes:
      decay: share of the average before an update in the one after it.
    """

    decay: float

    def update(self, part: Any, update: Update) -> Any:
        return jax.tree.map(
            # In this form the average of constant parameters equals them exactly.
            lambda e, p: (e + (1 - self.decay) * (p.astype(e.dtype) - e)).astype(e.dtype),
            part,
            update.params,
        )


@dataclasses.dataclass(frozen=True)
class OptimizerAverage(_Average):
    """The average that an optimiser defines."""

    averaged: Averaged

    def update(self, part: Any, update: Update) -> Any:
        state = update.opt_state
        own = state.inner if isinstance(state, Rounded) else state
        average = trainable.join(self.averaged(own, update.trained), update.frozen)
        return jax.tree.map(lambda e, a: a.astype(e.dtype), part, average)


def average_of(ema_decay: float | None, averaged: Averaged | None) -> StepExtension | None:
    """Returns the average of a recipe with these settings; None without one. Raises ValueError if it has both."""
    if ema_decay is not None and averaged is not None:
        raise ValueError(
            "Recipe.ema_decay and Recipe.averaged both define the average that is evaluated and released: bind one of them."
        )
    if ema_decay is not None:
        return MovingAverage(ema_decay)
    return None if averaged is None else OptimizerAverage(averaged)
