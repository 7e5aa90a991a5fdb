"""The matrix product that every projection uses. Shapes: I inputs, O outputs, '...' any leading."""

import jax

from espalier.model.kernels import narrow
from espalier.model.kernels.platform import reference_forms, target_platform


def matmul(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """Returns x[..., I] @ kernel[I, O] -> [..., O], in the operands' common dtype.

    On CPU the backward pass is written by hand, because the layout of the operands decides the speed
    there (see `_direct`). The values equal the plain product's.
    """
    dtype = jax.numpy.result_type(x, kernel_IO)
    x, kernel_IO = x.astype(dtype), kernel_IO.astype(dtype)
    if target_platform() == "cpu" and not reference_forms():
        return _direct(x, kernel_IO)
    return _plain(x, kernel_IO)


def _plain(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel_IO, (((x.ndim - 1,), (0,)), ((), ())))


@jax.custom_vjp
def _direct(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """Returns the product; its backward pass computes dW = x^T dy directly as [I, O].

    Autodiff computes dy^T x and transposes the result; XLA's CPU backend then copies the upstream
    gradient transposed and multiplies at about half the rate.
    """
    if narrow.applies(kernel_IO):
        return narrow.product(x, kernel_IO, 1).astype(x.dtype)
    return _plain(x, kernel_IO)


def _direct_fwd(x, kernel_IO):
    return _plain(x, kernel_IO), (x, kernel_IO)


def _direct_bwd(residuals, dy):
    x, kernel_IO = residuals
    dx = jax.lax.dot_general(dy, kernel_IO, (((dy.ndim - 1,), (1,)), ((), ())))
    # Flatten to one contracted dimension: with several, XLA first copies x transposed.
    x_XI, dy_XO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dx, _gradient(x_XI, dy_XO)


def _gradient(x_XI: jax.Array, dy_XO: jax.Array) -> jax.Array:
    """Returns x^T dy. The narrower operand comes first: with few columns in the second, XLA's product takes up to six times as long."""
    if dy_XO.shape[-1] >= x_XI.shape[-1]:
        return jax.lax.dot_general(x_XI, dy_XO, (((0,), (0,)), ((), ())))
    dkernel_OI = jax.lax.dot_general(dy_XO, x_XI, (((0,), (0,)), ((), ())))
    # Without the barrier XLA turns the product round again.
    return jax.lax.optimization_barrier(dkernel_OI).T


_direct.defvjp(_direct_fwd, _direct_bwd)
