"""Kernels of int8 numbers with a float32 scale for each output channel, for inference: w is about q * s, and x @ w is (x @ q) * s.

A projection whose parameters have SCALE beside its kernel reads it so. model/transforms/int8_weights.py makes such parameters.

Shapes: I inputs, O outputs, E experts, R rows sorted by expert, '...' any leading.
"""

from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from espalier.model import axes
from espalier.model.kernels import narrow, taps

SCALE = "kernel_scale"  # the parameter beside 'kernel', float32 [..., O]
_LARGEST = 127  # -128 is not used, so that q and -q are alike


class Int8WeightsError(ValueError):
    """Something that int8 weights cannot do."""


def quantise(w: Any) -> tuple[Any, Any]:
    """Returns (q, s) of kernels w [..., I, O]: the nearest int8 [..., I, O] to w / s, with s [..., O] = max |w| over I / 127.

    NumPy arrays give NumPy arrays, others arrays of JAX. |w - q s| is at most s / 2 = max |w| / 254. A channel of zeros has s = 1;
    one that is not finite has an s that is not finite, so that its products are not either.
    """
    xp: ModuleType = np if isinstance(w, np.ndarray) else jnp
    w = w.astype(xp.float32)
    most = abs(w).max(-2)
    scale = xp.where(most == 0, xp.ones_like(most), most / _LARGEST)
    # A multiple of a subnormal scale may round beyond the largest.
    quotient = xp.nan_to_num(xp.rint(w / scale[..., None, :]))
    return xp.clip(quotient, -_LARGEST, _LARGEST).astype(xp.int8), scale


def scale_of(module: nn.Module) -> jax.Array | None:
    """Returns the scales of a module's int8 kernel; None if its kernel is none.

    Raises:
      Int8WeightsError: a tap reads the projections.
    """
    if not module.has_variable("params", SCALE):
        return None
    if taps.is_active():
        raise Int8WeightsError(
            "The weights are int8 (WEIGHTS_DTYPE), and influence functions read those of the checkpoint: remove WEIGHTS_DTYPE."
        )
    return axes.unboxed(module.get_variable("params", SCALE))


def matmul(x: jax.Array, kernel_IO: jax.Array, scale_O: jax.Array) -> jax.Array:
    """Returns (x[..., I] @ kernel) * scale -> [..., O] in the dtype of x."""
    if narrow.applies(kernel_IO):
        y = narrow.product(x, kernel_IO, 1)
    else:
        # Within the loop over new tokens, or XLA would store the converted kernel before it.
        kernel_IO, x = jax.lax.optimization_barrier((kernel_IO, x))
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        y = jax.lax.dot_general(
            x, kernel_IO.astype(x.dtype), dims, preferred_element_type=summed(x)
        )
    return (y * scale_O.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


def summed(x: jax.Array) -> Any:
    """Returns the dtype of sums of x times whole numbers up to 127, which float16 may not hold."""
    return jnp.float32 if x.dtype == jnp.float16 else x.dtype


def dequantised(kernel: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Returns float kernels [..., I, O]; the kernels themselves without scales."""
    return kernel if scale is None else kernel * scale[..., None, :]
