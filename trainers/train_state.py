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
      ema_params: a moving average of `params`, in float32 where they are trained, or None where
        none is kept; frozen parameters are in it too, so that it can stand in for `params`.
      variables: the model's other lasting collections, such as batch statistics, by name.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema_params: Any = None
    variables: Any = struct.field(default_factory=dict)
