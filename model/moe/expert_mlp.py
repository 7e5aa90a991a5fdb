"""Gated MLPs of experts as one loop over blocks of rows, for CPUs.

Three grouped products (model/moe/grouped_matmul.py) loop over the same blocks nine times for a training step, and store what
lies between them. Here one loop computes a block's whole MLP, and one computes all of its gradients.

Shapes: R rows sorted by expert, E experts, D width, F hidden width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from espalier.model import axes
from espalier.model.kernels import taps
from espalier.model.kernels.platform import reference_forms, target_platform
from espalier.model.moe.row_blocks import kernel_gradient, over_blocks, product, rows_gradient

Activation = Callable[[jax.Array], jax.Array]
Kernels = tuple[jax.Array, jax.Array, jax.Array]  # gate [E, D, F], up [E, D, F] and down [E, F, D]


def applies(sizes: jax.Array) -> bool:
    """Returns whether `expert_mlp` is to be used for rows of these `sizes`, see grouped_matmul."""
    cpu = target_platform() == "cpu" and not reference_forms()
    return cpu and sizes.ndim == 1 and not taps.is_active() and not axes.free_mesh_axes()


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
