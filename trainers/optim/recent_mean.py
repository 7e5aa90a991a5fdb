"""The mean of a run's last few states, evaluated and released instead of the newest parameters.

It is the linear merge, with equal weights, of the parameters after the last `window` multiples of `every` updates, such as
the last checkpoints. It does not change training. t5x_configs/methods/averaging/recent_mean.gin binds it.

The states are in the optimiser's state, so a run that is stopped within a window continues with them, and memory grows by
`window` + 1 times the trained parameters.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from espalier.common.ranges import Size
from espalier.trainers.optim.gradient_terms import ParamAxes


class RecentMean(NamedTuple):
    """The state of an optimiser with a mean.

    Attributes:
      inner: the optimiser's own state.
      step: number of updates.
      started: whether there is a state.
      states: the parameters at the last multiples of `every`; the slot of the oldest is used next.
      mean: their mean; of no meaning before the first.
    """

    inner: Any
    step: jax.Array
    started: jax.Array
    states: tuple[Any, ...]
    mean: Any


def recent_mean(
    *,
    learning_rate: Any,
    param_axes: ParamAxes,
    optimizer: Callable[..., optax.GradientTransformation],
    every: Size,
    window: Size = 3,
) -> optax.GradientTransformation:
    """Returns an optimiser that also has the mean of the last states.

    Args:
      learning_rate, param_axes: see trainers/optim/optimizers.py.
      optimizer: factory of the optimiser, called with (learning_rate=) and, if it has that parameter, (param_axes=).
      every: number of updates between two states.
      window: number of states.
    """
    takes_axes = "param_axes" in inspect.signature(optimizer).parameters
    more = {"param_axes": param_axes} if takes_axes else {}
    inner = optimizer(learning_rate=learning_rate, **more)

    def init(params: Any) -> RecentMean:
        copies = [jax.tree.map(jnp.array, params) for _ in range(window + 1)]
        step, started = jnp.zeros([], jnp.int32), jnp.zeros([], bool)
        return RecentMean(inner.init(params), step, started, tuple(copies[1:]), copies[0])

    def update(updates: Any, state: RecentMean, params: Any = None) -> tuple[Any, RecentMean]:
        updates, inner_state = inner.update(updates, state.inner, params)
        step = optax.safe_increment(state.step)
        newest = optax.apply_updates(params, updates)

        def added(_: None) -> tuple[tuple[Any, ...], Any]:
            slot = (step // every - 1) % window
            number = jnp.minimum(step // every, window)
            states = tuple(
                jax.tree.map(lambda new, old, i=i: jnp.where(slot == i, new, old), newest, old)
                for i, old in enumerate(state.states)
            )
            return states, _mean(newest, states, number)

        states, mean = jax.lax.cond(
            step % every == 0, added, lambda _: (state.states, state.mean), None
        )
        return updates, RecentMean(inner_state, step, step >= every, states, mean)

    return optax.GradientTransformation(init, update)


def _mean(newest: Any, states: tuple[Any, ...], number: jax.Array) -> Any:
    """Returns the mean of the first `number` states; in this form that of equal states is exact."""

    def mean(new: jax.Array, *olds: jax.Array) -> jax.Array:
        wide = new.astype(jnp.promote_types(new.dtype, jnp.float32))
        apart = [
            jnp.where(i < number, old.astype(wide.dtype) - wide, 0) for i, old in enumerate(olds)
        ]
        return (wide + sum(apart) / number).astype(new.dtype)

    return jax.tree.map(mean, newest, *states)


def mean_of(opt_state: Any, params: Any) -> Any:
    """Returns the mean in an optimiser's state, or the parameters before the first state; for Recipe.averaged.

    Raises:
      ValueError: the optimiser has no mean.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, RecentMean))
    own = [leaf for leaf in leaves if isinstance(leaf, RecentMean)]
    if len(own) != 1:
        raise ValueError(
            "Recipe.averaged = @recent_mean.mean_of needs the optimiser @recent_mean.recent_mean: give "
            "t5x_configs/methods/averaging/recent_mean.gin."
        )
    (state,) = own
    return jax.tree.map(lambda mean, new: jnp.where(state.started, mean, new), state.mean, params)
