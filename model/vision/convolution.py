"""`Conv`: the convolution that vision models use, apart from 1x1 convolutions.

A 1x1 convolution is a projection of channels and uses `Dense` (model/linear.py).

Shapes: B batch, H height, W width, C channels; I channels in, O out; h, w the kernel's sides.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import recordable
from espalier.model.axes import CHANNELS, CHANNELS_IN, parameter

# He et al. (arXiv 1502.01852), by fan-in: preserves the scale of activations after rectifiers.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def convolve(x_BHWI: jax.Array, kernel_hwIO: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Returns the convolution with zero padding ('SAME'), [B, H/s, W/s, O] for stride s."""
    return jax.lax.conv_general_dilated(
        x_BHWI, kernel_hwIO, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@recordable
class Conv(nn.Module):
    """A square convolution with zero padding, kernel [side, side, in, out].

    Attributes:
      use_bias: adds a bias per channel, initially zero; it has no effect before batch normalisation.
    """

    features: int
    side: int = 3
    stride: int = 1
    use_bias: bool = False
    kernel_init: Callable = he_normal
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWI: jax.Array) -> jax.Array:
        y_BHWO = self.product(x_BHWI.astype(self.dtype))
        if self.use_bias:
            zeros, shape = nn.initializers.zeros, (self.features,)
            bias = parameter(self, "bias", zeros, (CHANNELS,), shape, self.param_dtype)
            y_BHWO = y_BHWO + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return y_BHWO

    def product(self, x_BHWI: jax.Array) -> jax.Array:
        """Returns the convolution without bias; factorised convolutions override it."""
        shape = (self.side, self.side, x_BHWI.shape[-1], self.features)
        names = (None, None, CHANNELS_IN, CHANNELS)
        kernel = parameter(self, "kernel", self.kernel_init, names, shape, self.param_dtype)
        return convolve(x_BHWI, kernel.astype(self.dtype), (self.stride, self.stride))
