"""Logits of hidden states for rows of the vocabulary, and chunks of tokens or of the vocabulary.

Shapes: T tokens, V rows, D width; J chunks of C rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LogitForm(NamedTuple):
    """Settings of logits softcap(scale * h head^T); hashable, so custom derivatives can take them.

    Attributes:
      scale: factor on the products.
      softcap: c in c * tanh(x / c), or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, h_TD: jax.Array, head_VD: jax.Array) -> jax.Array:
        """Returns logits [T, V] in float32 or wider."""
        wide = jnp.promote_types(h_TD.dtype, jnp.float32)
        logits_TV = jnp.einsum("td,vd->tv", h_TD, head_VD, preferred_element_type=wide)
        logits_TV = logits_TV * self.scale
        if self.softcap is not None:
            logits_TV = self.softcap * jnp.tanh(logits_TV / self.softcap)
        return logits_TV

    def product_gradient(self, d_TV: jax.Array, logits_TV: jax.Array) -> jax.Array:
        """Returns the gradient of the products h head^T from the gradient of the logits."""
        d_TV = d_TV * self.scale
        if self.softcap is not None:
            d_TV = d_TV * (1 - jnp.square(logits_TV / self.softcap))
        return d_TV


def split_rows(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Reshapes each [T, ...] -> [J, C, ...], C <= chunk, padded by zeros.

    Chunk j has the rows j, j + J, j + 2J, ... With this stride, rows that are split over devices stay
    evenly split in every chunk.
    """
    T = arrays[0].shape[0]
    J = -(-T // chunk)
    C = -(-T // J)

    def split(x):
        x = jnp.pad(x, ((0, J * C - T),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(C, J, *x.shape[1:]).swapaxes(0, 1)

    return tuple(map(split, arrays))


def join_rows(T: int, x: jax.Array) -> jax.Array:
    """Reshapes [J, C, ...] -> [T, ...], the inverse of `split_rows`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:T]
