"""Everything that a train step reads and writes."""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class TrainState:
    """The state of a run, donated to each step and saved in each checkpoint.

    Attributes:
      step: how many steps were taken; int32 scalar.
      params: the parameters as nested dicts of arrays.
      opt_state: the optimiser's state, an optax pytree.
      ema_params: an average of `params`, in float32 where they are trained, frozen parameters included; None without
        one (Recipe.ema_decay, Recipe.averaged).
      variables: the model's other lasting collections, such as batch statistics, by name.
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
