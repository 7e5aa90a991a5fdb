"""Loops over blocks of rows that are sorted by expert, for CPUs: the products of a block, and gated MLPs as one loop.

Three grouped products (model/moe/grouped_matmul.py) loop over the same blocks nine times for a training step, and store what
lies between them. In `expert_mlp` one loop computes a block's whole MLP, and one computes all of its gradients.

Shapes: R rows sorted by expert, N rows of a block, E experts, X in, Y out, D width, F hidden width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from espalier.model import axes
from espalier.model.kernels import narrow
from espalier.model.kernels.platform import reference_forms, target_platform

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


Activation = Callable[[jax.Array], jax.Array]
Kernels = tuple[jax.Array, jax.Array, jax.Array]  # gate [E, D, F], up [E, D, F] and down [E, F, D]


def applies() -> bool:
    """Returns whether `expert_mlp` is to be used for the rows of one device, see grouped_matmul."""
    cpu = target_platform() == "cpu" and not reference_forms()
    return cpu and not axes.free_mesh_axes()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_mlp(
    act: Activation, rows_RD: jax.Array, kernels: Kernels, sizes_E: jax.Array
) -> jax.Array:
    """Returns down_e(act(gate_e(x)) * up_e(x)) of every row x with its expert's kernels, [R, D].

    Results for rows after the last expert's rows are undefined.

    Args:
      act: an elementwise function.
      kernels: of gate, up and down.
      sizes_E: number of rows of each expert, at most R in total.
    """
    width = kernels[2].shape[-1]

    def put(expert, block, own, y_RD):
        _, _, y = _block(act, block(rows_RD), kernels, expert, gradient=False)
        return block.put(y_RD, y, own)

    y_RD = jnp.zeros((len(rows_RD), width), rows_RD.dtype)
    return over_blocks(put, sizes_E, len(rows_RD), y_RD)


def _block(act, rows, kernels, expert, *, gradient: bool) -> tuple[jax.Array, ...]:
    """Returns the results of gate, up and down for a block of rows."""
    gate_EDF, up_EDF, down_EFD = kernels
    gate, up = (product(rows, k_EDF, expert, gradient=gradient) for k_EDF in (gate_EDF, up_EDF))
    return gate, up, product(act(gate) * up, down_EFD, expert, gradient=gradient)


def _forward(act, rows_RD, kernels, sizes_E):
    def put(expert, block, own, results):
        values = _block(act, block(rows_RD), kernels, expert, gradient=True)
        return tuple(block.put(r, value, own) for r, value in zip(results, values, strict=True))

    widths = (kernel.shape[-1] for kernel in kernels)
    empty = tuple(jnp.zeros((len(rows_RD), width), rows_RD.dtype) for width in widths)
    gate_RF, up_RF, y_RD = over_blocks(put, sizes_E, len(rows_RD), empty)
    return y_RD, (rows_RD, kernels, sizes_E, gate_RF, up_RF)


def _backward(act, residuals, dy_RD):
    rows_RD, kernels, sizes_E, gate_RF, up_RF = residuals

    def add(expert, block, own, gradients):
        drows_RD, dkernels = gradients
        gate_DF, up_DF, down_FD = (kernel[expert] for kernel in kernels)
        rows = block(rows_RD)
        hidden, pull = jax.vjp(lambda gate, up: act(gate) * up, block(gate_RF), block(up_RF))
        # Rows of other experts are masked here, which makes all of their gradients zero.
        dy = jnp.where(own, block(dy_RD), 0)
        dgate, dup = pull(rows_gradient(dy, down_FD))
        drows = rows_gradient(dgate, gate_DF) + rows_gradient(dup, up_DF)
        of_block = (
            kernel_gradient(rows, dgate),
            kernel_gradient(rows, dup),
            kernel_gradient(hidden, dy),
        )
        dkernels = tuple(d.at[expert].add(g) for d, g in zip(dkernels, of_block, strict=True))
        return block.put(drows_RD, drows, own), dkernels

    zeros = jax.tree.map(jnp.zeros_like, (rows_RD, kernels))
    return *over_blocks(add, sizes_E, len(rows_RD), zeros), None


expert_mlp.defvjp(_forward, _backward)
