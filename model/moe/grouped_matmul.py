"""Products of rows, sorted by expert, with the kernels of their experts.

Shapes: R rows, E experts, X in, Y out.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from model.kernels import narrow
from model.kernels.platform import reference_forms, target_platform
from model.moe import grouped_matmul_hopper, grouped_matmul_tpu, parallel

# Rows per block on CPU. A block reads its expert's whole kernel, so large blocks are faster. The number of
# an expert's rows is rounded up to a multiple of the last, smallest length.
_LENGTHS = (256, 128, 64, 16)


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
    product = narrow.product_of if narrow.applies(kernel_EXY) else _product_of
    return _products(rows_RX, kernel_EXY, sizes_E, product)


def _products(rows_RX, kernel_EXY, sizes_E, product: Callable[..., jax.Array]) -> jax.Array:
    def put(expert, block, own, out_RY):
        y = product(block(rows_RX), kernel_EXY, expert).astype(out_RY.dtype)
        return block.put(out_RY, jnp.where(own, y, block(out_RY)))

    out_RY = jnp.zeros((len(rows_RX), kernel_EXY.shape[-1]), rows_RX.dtype)
    return _over_blocks(put, sizes_E, len(rows_RX), out_RY)


def _product_of(rows_RX: jax.Array, kernel_EXY: jax.Array, expert: jax.Array) -> jax.Array:
    return rows_RX @ kernel_EXY[expert]


def _blocks_fwd(rows_RX, kernel_EXY, sizes_E):
    out_RY = _products(rows_RX, kernel_EXY, sizes_E, _product_of)
    return out_RY, (rows_RX, kernel_EXY, sizes_E)


def _blocks_bwd(residuals, dy_RY):
    rows_RX, kernel_EXY, sizes_E = residuals

    def add(expert, block, own, gradients):
        drows_RX, dkernel_EXY = gradients
        # Rows of other experts are masked in one operand, which is enough.
        dy = jnp.where(own, block(dy_RY), 0)
        drows = jax.lax.dot_general(dy, kernel_EXY[expert], (((1,), (1,)), ((), ())))
        dkernel_XY = jax.lax.dot_general(block(rows_RX), dy, (((0,), (0,)), ((), ())))
        drows = block.put(drows_RX, jnp.where(own, drows, block(drows_RX)))
        return drows, dkernel_EXY.at[expert].add(dkernel_XY)

    zeros = (jnp.zeros_like(rows_RX), jnp.zeros_like(kernel_EXY))
    return *_over_blocks(add, sizes_E, len(rows_RX), zeros), None


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


class _Block:
    """A slice of `length` rows from `start` on, for arrays whose first dimension is rows."""

    def __init__(self, start: jax.Array, length: int):
        self.start, self.length = start, length

    def __call__(self, rows: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(rows, self.start, self.length)

    def put(self, rows: jax.Array, values: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, values, self.start, 0)


def _over_blocks(step: Callable[..., Any], sizes_E: jax.Array, rows: int, state: Any) -> Any:
    """Folds `state = step(expert, block, own, state)` over blocks that cover every expert's rows.

    `own` [length, 1] is True for rows that belong to the expert and were not in an earlier block. The number of other
    rows in a block is below the smallest block length.
    """
    lengths = [length for length in _LENGTHS if length <= rows] or [rows]
    ends_E = jnp.cumsum(sizes_E)

    def of_expert(expert, state):
        end = ends_E[expert]
        carry = (end - sizes_E[expert], state)
        for length in lengths:
            # A block may extend beyond the expert's last row only where the smallest block also would.
            slack = lengths[-1] - 1

            def fits(carry, length=length, slack=slack):
                return carry[0] + length - slack <= end

            def body(carry, length=length):
                first, state = carry
                start = jnp.minimum(first, rows - length)
                index = start + jnp.arange(length)
                own = ((index >= first) & (index < end)).reshape(-1, 1)
                return first + length, step(expert, _Block(start, length), own, state)

            carry = jax.lax.while_loop(fits, body, carry)
        return carry[1]

    if not rows:
        return state
    return jax.lax.fori_loop(0, len(sizes_E), of_expert, state)
