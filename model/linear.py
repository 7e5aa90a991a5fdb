"""`Dense`: the projection that attention, MLPs and experts use; and dropout.

Factorised training and quantisation replace this class through the `dense` factory of the module that owns the
projection, and taps (model/kernels/taps.py) read its inputs and gradients; adapters wrap what that factory makes
(model/adapters/adapter.py). A head that is not tied is a table of rows like the embedding (model/embed.py), because the loss
reads rows of the vocabulary.
"""

from collections.abc import Callable
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import CalledWith, Size, recordable
from espalier.model.axes import parameter, unboxed
from espalier.model.flops import Counted
from espalier.model.kernels import int8, matmul, taps

# The factory of a projection that has no bias, and whose caller initialises it.
Pointwise = Annotated[
    Callable[..., nn.Module],
    CalledWith("features", "axes", "kernel_init", "dtype", "param_dtype", "name"),
]

# Variance 1/fan_in keeps activations at unit scale; the normal is truncated at two standard deviations.
fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


@recordable
class Dense(Counted):
    """y = x @ kernel (+ bias), with a two-dimensional kernel [in, out].

    Attributes:
      axes: logical names of the kernel's two dimensions.
      use_bias: adds a bias over the output, zero at the start.
    """

    features: Size
    axes: tuple[str, str]
    use_bias: bool = False
    kernel_init: Callable = fan_in_normal
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        y = self.product(x)
        if self.use_bias:
            zeros, shape = nn.initializers.zeros, (self.features,)
            bias = parameter(self, "bias", zeros, self.axes[1:], shape, self.param_dtype)
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return self.tapped(x, y)

    def tapped(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the output y for the input x, after a tap; factorised projections override it."""
        return taps.projection(self, "kernel", x, y, bias=self.use_bias)

    def product(self, x: jax.Array) -> jax.Array:
        """Returns x @ kernel; factorised and adapted projections override it."""
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, self.axes, shape, self.param_dtype)
        if (scale := int8.scale_of(self)) is not None:
            return int8.matmul(x, kernel, scale)
        return matmul.matmul(x, kernel.astype(self.dtype))

    def matrix(self) -> jax.Array:
        """Returns the matrix [in, out] of `product`, once the layer was called."""
        return int8.dequantised(unboxed(self.get_variable("params", "kernel")), int8.scale_of(self))


def dropped(module: nn.Module, x: jax.Array, rate: float, *, over: int = -2) -> jax.Array:
    """Returns x with a share `rate` of its values dropped; x itself with rate 0, and outside of training.

    Dropout (Srivastava et al., 2014) zeroes some values and divides the others by their share. Draws from the rng 'dropout' of a bound module, which only training has.

    Args:
      over: axis along which all values are dropped together; the default is the length of [B, T, D].
    """
    if not rate or not module.has_rng("dropout"):
        return x
    shape = list(x.shape)
    shape[over] = 1
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, tuple(shape))
    return x * (keep.astype(x.dtype) / (1 - rate))
