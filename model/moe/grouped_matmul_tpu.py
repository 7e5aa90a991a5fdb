"""Grouped products on TPUs: XLA's, with megablox for the gradient of the experts' kernels.

XLA groups the product and the gradient of its rows. For the gradient of the kernels it would mask all rows for every expert
and multiply them, E times the FLOPs.

Shapes: R rows, E experts, X in, Y out.
"""

import functools

import jax
import jax.numpy as jnp

from espalier.model import axes

_ROWS = 128  # of a tile; tiles that two experts share are multiplied for both
_COLUMNS = 512  # of a tile, at most
_LANES = 128


def problem(kernel_EXY: jax.Array) -> str:
    """Returns why megablox does not support the gradient of these kernels, or ''."""
    _, X, Y = kernel_EXY.shape
    if X % _LANES or Y % _LANES:
        return f"kernels [{X}, {Y}] (multiples of {_LANES})"
    if axes.free_mesh_axes():
        # XLA cannot split a Pallas kernel.
        return "a mesh whose axes split the model's own dimensions"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def tpu_matmul(
    rows_RX: jax.Array, kernel_EXY: jax.Array, sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
    """Returns the products of rows with their expert's kernel, [R, Y]; see `grouped_matmul`. `problem` must be ''.

    Args:
      sizes_E: int32, the number of rows of each expert.
      interpret: whether the kernel of the gradient runs in JAX's interpreter, for tests.
    """
    return jax.lax.ragged_dot(rows_RX, kernel_EXY, sizes_E)


def _forward(rows_RX, kernel_EXY, sizes_E, interpret):
    del interpret
    out_RY = jax.lax.ragged_dot(rows_RX, kernel_EXY, sizes_E)
    return out_RY, (rows_RX, kernel_EXY, sizes_E)


def _backward(interpret, residuals, dy_RY):
    # Importing Pallas takes half a second, and only these programs need it.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows_RX, kernel_EXY, sizes_E = residuals
    _, pull = jax.vjp(lambda rows: jax.lax.ragged_dot(rows, kernel_EXY, sizes_E), rows_RX)
    (drows_RX,) = pull(dy_RY)
    missing = -len(rows_RX) % _ROWS
    rows, dy = (jnp.pad(x, ((0, missing), (0, 0))) for x in (rows_RX, dy_RY))
    dkernel_EXY = tgmm(
        rows.T,
        dy.astype(rows.dtype),
        sizes_E,
        kernel_EXY.dtype,
        (_ROWS, *(min(_COLUMNS, width) for width in kernel_EXY.shape[1:])),
        interpret=interpret,
    )
    return drows_RX, dkernel_EXY, None


tpu_matmul.defvjp(_forward, _backward)
