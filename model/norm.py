"""Normalisation over the last axis, computed in float32, or float64 for inputs in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import Finite, NonNegative, Size, recordable
from espalier.model import axes


@recordable
class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) (Zhang and Sennrich, arXiv 1910.07467).

    Attributes:
      offset: added to the stored gains, which start at 1 - offset. With 1, weight decay pulls the
        effective gains towards 1 (Gemma).
      scale_dims: number of trailing dimensions that have gains: 1, or 2 for a gain per head and dimension.
    """

    eps: NonNegative = 1e-6
    offset: Finite = 0.0
    scale_dims: Size = 1
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        gain = _gain(self, "scale", nn.initializers.constant(1.0 - self.offset), x)
        if self.offset:
            gain = gain + self.offset
        return (y * gain).astype(x.dtype)


@recordable
class LayerNorm(nn.Module):
    """(x - mean) / std * scale (+ bias) (Ba et al., arXiv 1607.06450), by default without bias.

    Attributes:
      use_bias: adds a learned bias (GPT-2).
      scale_dims: number of trailing dimensions that have gains: 1, or 2 for a gain per head and dimension.
    """

    eps: NonNegative = 1e-5
    use_bias: bool = False
    scale_dims: Size = 1
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        y = y * _gain(self, "scale", nn.initializers.ones, x)
        if self.use_bias:
            y = y + _gain(self, "bias", nn.initializers.zeros, x)
        return y.astype(x.dtype)


def _gain(module, name: str, init, x: jax.Array) -> jax.Array:
    """Returns a parameter over the last `scale_dims` dimensions, with a shape that broadcasts against x."""
    dims = module.scale_dims
    # An axis name may occur only once in an array.
    names, shape = (axes.UNMODELED, axes.NORM)[-dims:], x.shape[-dims:]
    value = axes.parameter(module, name, init, names, shape, module.param_dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return value.astype(wide).reshape((1,) * (x.ndim - dims) + shape)
