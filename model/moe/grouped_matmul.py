"""Products of rows, sorted by expert, with the kernels of their experts.

Shapes: R rows, E experts, X in, Y out.
"""

import functools
import warnings
from typing import Literal

import jax
import jax.numpy as jnp

from espalier.model.kernels.platform import reference_forms, target_platform
from espalier.model.moe import grouped_matmul_hopper, grouped_matmul_tpu, parallel
from espalier.model.moe.row_blocks import kernel_gradient, over_blocks, product, rows_gradient


def grouped_matmul(rows_RX: jax.Array, kernel_EXY: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns the products of rows, sorted by expert, with their expert's kernel, [R, Y].

    On TPUs this is jax.lax.ragged_dot, with the gradient of the kernels by megablox (grouped_matmul_tpu.py); calls that
    it does not support compute that gradient at E times its FLOPs, with one warning. On CPUs and GPUs ragged_dot multiplies every row with every expert. On a
    CPU a loop multiplies blocks of rows instead, as many as the sizes need. On a Hopper GPU a Pallas kernel does
    (grouped_matmul_hopper.py); other GPUs, and calls that it does not support, take ragged_dot with one warning of
    the cost. Results for rows after the last expert's rows are undefined.

    Args:
      sizes_E: number of rows of each expert, at most R in total; or [G, E / devices of an expert axis]
        if the rows are on G devices (see model/moe/parallel.py).
    """
    if sizes_E.ndim == 2:
        return parallel.per_device(grouped_matmul, rows_RX, kernel_EXY, sizes_E)
    sizes_E = sizes_E.astype(jnp.int32)
    form = _choose(rows_RX, kernel_EXY)
    if form == "blocks":
        return _blocks(rows_RX, kernel_EXY, sizes_E)
    if form == "megablox":
        return grouped_matmul_tpu.tpu_matmul(rows_RX, kernel_EXY, sizes_E)
    if form == "hopper":
        return grouped_matmul_hopper.hopper_matmul(rows_RX, kernel_EXY, sizes_E)
    return jax.lax.ragged_dot(rows_RX, kernel_EXY, sizes_E)


def _choose(
    rows_RX: jax.Array, kernel_EXY: jax.Array
) -> Literal["blocks", "hopper", "megablox", "ragged_dot"]:
    """Returns the form for the target platform; warns of the cost of ragged_dot."""
    if reference_forms():
        return "ragged_dot"
    if target_platform() == "cpu":
        return "blocks"
    if target_platform() == "gpu":
        problem = grouped_matmul_hopper.problem(rows_RX, kernel_EXY)
        if not problem:
            return "hopper"
        _warn(grouped_matmul_hopper.cost(len(kernel_EXY), problem))
    if target_platform() == "tpu":
        problem = grouped_matmul_tpu.problem(kernel_EXY)
        if not problem:
            return "megablox"
        _warn(
            f"The gradient of the kernels of {len(kernel_EXY)} experts takes {len(kernel_EXY)} times its FLOPs here, because "
            f"XLA multiplies all rows for every expert. megablox does not support {problem}."
        )
    return "ragged_dot"


@functools.cache  # once for all layers
def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


@jax.custom_vjp
def _blocks(rows_RX: jax.Array, kernel_EXY: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _products(rows_RX, kernel_EXY, sizes_E, gradient=False)


def _products(rows_RX, kernel_EXY, sizes_E, *, gradient: bool) -> jax.Array:
    def put(expert, block, own, out_RY):
        y = product(block(rows_RX), kernel_EXY, expert, gradient=gradient)
        return block.put(out_RY, y, own)

    out_RY = jnp.zeros((len(rows_RX), kernel_EXY.shape[-1]), rows_RX.dtype)
    return over_blocks(put, sizes_E, len(rows_RX), out_RY)


def _blocks_fwd(rows_RX, kernel_EXY, sizes_E):
    out_RY = _products(rows_RX, kernel_EXY, sizes_E, gradient=True)
    return out_RY, (rows_RX, kernel_EXY, sizes_E)


def _blocks_bwd(residuals, dy_RY):
    rows_RX, kernel_EXY, sizes_E = residuals

    def add(expert, block, own, gradients):
        drows_RX, dkernel_EXY = gradients
        # Rows of other experts are masked in one operand, which is enough.
        dy = jnp.where(own, block(dy_RY), 0)
        drows_RX = block.put(drows_RX, rows_gradient(dy, kernel_EXY[expert]), own)
        return drows_RX, dkernel_EXY.at[expert].add(kernel_gradient(block(rows_RX), dy))

    zeros = (jnp.zeros_like(rows_RX), jnp.zeros_like(kernel_EXY))
    return *over_blocks(add, sizes_E, len(rows_RX), zeros), None


_blocks.defvjp(_blocks_fwd, _blocks_bwd)
