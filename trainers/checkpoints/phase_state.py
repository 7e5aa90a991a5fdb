"""A state as the beginning of another phase of training, or at another step of its schedule."""

from typing import Any

import jax
import numpy as np
import optax

from trainers.anomaly import STATISTICS


def at_step_0(state: Any) -> Any:
    """The state as the beginning of another phase: steps and schedules count from 0 again.

    Moments stay, and so do the counts that their bias is corrected by; statistics of losses do not, for
    other data have other losses.
    """
    variables = dict(state.variables)
    if STATISTICS in variables:
        variables[STATISTICS] = jax.tree.map(lambda leaf: _filled(leaf, 0), variables[STATISTICS])
    return at_step(state.replace(variables=variables), 0)


def at_step(state: Any, step: int) -> Any:
    """The state with its step and the place in its schedules set; moments and their counts stay."""

    def is_place(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return state.replace(
        step=_filled(state.step, step),
        opt_state=jax.tree.map(
            lambda node: (
                jax.tree.map(lambda leaf: _filled(leaf, step), node) if is_place(node) else node
            ),
            state.opt_state,
            is_leaf=is_place,
        ),
    )


def _filled(array: jax.Array, value: int) -> jax.Array:
    return jax.device_put(np.full(array.shape, value, array.dtype), array.sharding)
