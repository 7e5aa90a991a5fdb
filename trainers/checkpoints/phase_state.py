"""Moves a state to step 0 of a new phase of training, or to another step of its schedule."""

from typing import Any

import jax
import numpy as np
import optax

from trainers.anomaly import STATISTICS


def at_step_0(state: Any) -> Any:
    """Returns the state at the start of a phase, with steps and schedules at 0.

    Moments and their counts for bias correction do not change. Statistics of losses are reset, because
    a new phase has other data.
    """
    variables = dict(state.variables)
    if STATISTICS in variables:
        variables[STATISTICS] = jax.tree.map(lambda leaf: _filled(leaf, 0), variables[STATISTICS])
    return at_step(state.replace(variables=variables), 0)


def at_step(state: Any, step: int) -> Any:
    """Returns the state with its step and the counts of its schedules set; moments do not change."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def moved(node: Any) -> Any:
        return jax.tree.map(lambda leaf: _filled(leaf, step), node) if is_schedule(node) else node

    return state.replace(
        step=_filled(state.step, step),
        opt_state=jax.tree.map(moved, state.opt_state, is_leaf=is_schedule),
    )


def _filled(array: jax.Array, value: int) -> jax.Array:
    return jax.device_put(np.full(array.shape, value, array.dtype), array.sharding)
