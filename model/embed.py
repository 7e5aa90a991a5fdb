"""Token and position tables. Shapes: B batch, T length, D width, V vocabulary."""

from collections.abc import Callable
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import CalledWith, Size, recordable
from espalier.model import axes
from espalier.model.kernels import narrow, taps

# The factory of a table of tokens.
Table = Annotated[
    Callable[..., nn.Module],
    CalledWith("num_embeddings", "features", "dtype", "param_dtype"),
]


@recordable
class Embed(nn.Module):
    """A table [V, D] looked up by token id.

    Attributes:
      num_embeddings: V.
      features: D.
      embedding_init: initialiser; with std 0.02 the first logits of a tied head are small, so an
        untrained model's loss is close to ln V.
    """

    num_embeddings: Size
    features: Size
    embedding_init: Callable = nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self):
        shape, names = (self.num_embeddings, self.features), (axes.VOCAB, axes.EMBED)
        self.embedding = axes.parameter(
            self, "embedding", self.embedding_init, names, shape, self.param_dtype
        )

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Returns rows [B, T, D]; ids outside the table are clipped to its ends."""
        if narrow.applies(self.embedding):
            y_BTD = narrow.rows(self.embedding, ids_BT)
        else:
            y_BTD = jnp.take(self.embedding, ids_BT, axis=0, mode="clip")
        # Split as the table is. With the batch over several mesh axes, the partitioner otherwise
        # looks up in a whole table on every device, and its gradient is whole there too.
        y_BTD = axes.constrain(y_BTD.astype(self.dtype), axes.LOOKUP_BATCH, None, axes.EMBED)
        return taps.lookup(self, "embedding", ids_BT, y_BTD)


@recordable
class Positions(nn.Module):
    """A learned table of positions [P, D] (GPT-2).

    Attributes:
      num_positions: P, the length of the longest row the model can read.
      features: D.

    Raises:
      ValueError: a row is longer than P.
    """

    num_positions: Size
    features: Size
    embedding_init: Callable = nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        if positions_BT.shape[1] > self.num_positions:
            raise ValueError(
                f"Rows of {positions_BT.shape[1]} tokens do not fit the {self.num_positions} learned "
                "positions: shorten TASK_FEATURE_LENGTHS or raise embed.Positions.num_positions."
            )
        shape, names = (self.num_positions, self.features), (axes.POSITION, axes.EMBED)
        table = axes.parameter(
            self, "embedding", self.embedding_init, names, shape, self.param_dtype
        )
        return jnp.take(table, positions_BT, axis=0, mode="clip").astype(self.dtype)
