"""The objective seam: what every loss returns."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax

Batch = Mapping[str, jax.Array]


@flax.struct.dataclass
class LossOut:
    """A loss as numerator and weight, so that any split of the batch gives the same quotient.

    Attributes:
      sum: weighted sum of per-token (or per-example) losses, float32 scalar; differentiated.
      weight: sum of the weights.
      metrics: name -> (sum, weight), scalars or vectors; summed over microbatches, divided once.
      variables: updated non-parameter collections (batch statistics), or None.
    """

    sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]
    variables: Any = None


# (params, batch, rng) -> LossOut. Frozen extras (reference parameters) are bound beforehand.
# The rng is None in evaluation, where nothing is dropped.
LossFn = Callable[[Any, Batch, jax.Array | None], LossOut]
