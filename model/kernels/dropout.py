"""Dropout in training (Srivastava et al., 2014): zeroes some values and divides the others by their share."""

import flax.linen as nn
import jax


def dropped(module: nn.Module, x: jax.Array, rate: float, *, over: int = -2) -> jax.Array:
    """Returns x with a share `rate` of its values dropped; x itself with rate 0, and outside of training.

    Draws from the rng 'dropout' of a bound module, which only training has.

    Args:
      over: axis along which all values are dropped together; the default is the length of [B, T, D].
    """
    if not rate or not module.has_rng("dropout"):
        return x
    shape = list(x.shape)
    shape[over] = 1
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, tuple(shape))
    return x * (keep.astype(x.dtype) / (1 - rate))
