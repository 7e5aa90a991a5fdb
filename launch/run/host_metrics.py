"""What the host adds to a step's metrics: learning rate, tokens or images per second, utilisation."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from trainers.recipe import Program, Recipe
from trainers.telemetry import flops


def rates_of(recipe: Recipe, total_steps: int) -> np.ndarray:
    """The learning rate of each update, and of the one that would follow the last."""
    # Tabulated: evaluated one by one they would wait behind the step that is running.
    rate = jax.vmap(lambda step: jnp.asarray(recipe.learning_rate(step), jnp.float32))
    return np.asarray(rate(jnp.arange(total_steps + 1)))


def host_metrics(
    recipe: Recipe, program: Program, rates: np.ndarray
) -> Callable[[int, float], Mapping[str, float]]:
    per_unit, unit = flops_per_unit(recipe, program), recipe.reads.unit
    devices = list(program.mesh.devices.flat)

    def values(updates: int, rate: float) -> Mapping[str, float]:
        # An update is made with the rate of as many as there were before it.
        found = {"learning_rate": float(rates[max(updates - 1, 0)])}
        if rate:
            found[f"{unit}_per_second"] = rate
            found["model_flops_per_second"] = rate * per_unit
            mfu = flops.utilisation(rate, per_unit, devices)
            if mfu is not None:
                found["mfu"] = mfu
        return found

    return values


def flops_per_unit(recipe: Recipe, program: Program) -> float:
    """Returns the model FLOPs of training on one token, or on one image: three forward passes."""
    state = program.abstract_state
    variables = {"params": state.params, **state.variables}
    return 3.0 * recipe.model.forward_flops(recipe.reads.arrays(1), variables)
