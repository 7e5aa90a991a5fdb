"""Everything that a train step reads and writes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import struct

AVERAGE = "ema_params"  # the part that is a field of its own


@struct.dataclass
class TrainState:
    """The state of a run, donated to each step and saved in each checkpoint.

    Attributes:
      step: how many steps were taken; int32 scalar.
      params: the parameters as nested dicts of arrays.
      opt_state: the optimiser's state, an optax pytree.
      ema_params: an average of `params`, in float32 where they are trained, frozen parameters included; None without
        one (Recipe.ema_decay, Recipe.averaged).
      variables: the model's other lasting collections, such as batch statistics, and the parts of extensions
        (trainers/extensions.py), by name.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema_params: Any = None
    variables: Any = struct.field(default_factory=dict)

    @property
    def released_params(self) -> Any:
        """The parameters to evaluate, use and export: the average, if there is one."""
        return self.params if self.ema_params is None else self.ema_params

    def part(self, name: str) -> Any:
        """Returns a collection of `variables`, or 'ema_params'; None if the state holds none of this name."""
        return self.ema_params if name == AVERAGE else self.variables.get(name)

    def with_parts(self, parts: Mapping[str, Any]) -> "TrainState":
        """Returns the state with these parts."""
        variables = {**self.variables, **parts}
        average = variables.pop(AVERAGE, self.ema_params)
        return dataclasses.replace(self, ema_params=average, variables=variables)
