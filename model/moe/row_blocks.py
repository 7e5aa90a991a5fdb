"""Loops over blocks of rows that are sorted by expert, and the products of a block, for CPUs.

Shapes: R rows, N rows of a block, E experts, X in, Y out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from espalier.model.kernels import narrow

# Rows per block. A block reads its expert's whole kernel, so large blocks are faster. The number of
# an expert's rows is rounded up to a multiple of the last, smallest length.
LENGTHS = (256, 128, 64, 16)


def product(
    rows_NX: jax.Array, kernel_EXY: jax.Array, expert: jax.Array, *, gradient: bool
) -> jax.Array:
    """Returns the products of rows with the kernel of one expert, [N, Y], in the dtype of the rows.

    `gradient` says whether the call is of a forward pass for gradients, which keep the plain form.
    """
    if not gradient and narrow.applies(kernel_EXY):
        return narrow.product_of(rows_NX, kernel_EXY, expert).astype(rows_NX.dtype)
    return rows_NX @ kernel_EXY[expert]


def rows_gradient(dy_NY: jax.Array, kernel_XY: jax.Array) -> jax.Array:
    """Returns the gradient of the rows of a product, [N, X]."""
    return jax.lax.dot_general(dy_NY, kernel_XY, (((1,), (1,)), ((), ())))


def kernel_gradient(rows_NX: jax.Array, dy_NY: jax.Array) -> jax.Array:
    """Returns the gradient of the kernel of a product, [X, Y]."""
    return jax.lax.dot_general(rows_NX, dy_NY, (((0,), (0,)), ((), ())))


class Block:
    """A slice of `length` rows from `start` on, for arrays whose first dimension is rows."""

    def __init__(self, start: jax.Array, length: int):
        self.start, self.length = start, length

    def __call__(self, rows: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(rows, self.start, self.length)

    def put(self, rows: jax.Array, values: jax.Array, own: jax.Array) -> jax.Array:
        """Returns the rows with new values where `own` [length, 1] is True."""
        values = jnp.where(own, values, self(rows))
        return jax.lax.dynamic_update_slice_in_dim(rows, values, self.start, 0)


def over_blocks(step: Callable[..., Any], sizes_E: jax.Array, rows: int, state: Any) -> Any:
    """Folds `state = step(expert, block, own, state)` over blocks that cover every expert's rows.

    `own` [length, 1] is True for rows that belong to the expert and were not in an earlier block. The number of other
    rows in a block is below the smallest block length.
    """
    lengths = [length for length in LENGTHS if length <= rows] or [rows]
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
                return first + length, step(expert, Block(start, length), own, state)

            carry = jax.lax.while_loop(fits, body, carry)
        return carry[1]

    if not rows:
        return state
    return jax.lax.fori_loop(0, len(sizes_E), of_expert, state)
