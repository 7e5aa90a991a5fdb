"""Grouped products on NVIDIA Hopper GPUs: JAX's Pallas kernels for Mosaic GPU, with a gradient of the same kernels.

Elsewhere on GPUs `jax.lax.ragged_dot` becomes one product of all rows with all experts' kernels, most of it zeros.

Shapes: R rows, E experts, X in, Y out.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from espalier.model import axes

# Experimental modules of JAX, which a version may lack.
_MODULES = tuple(
    f"jax.experimental.pallas.ops.gpu.{name}_mgpu"
    for name in ("ragged_dot", "transposed_ragged_dot")
)
_BLOCK = 128  # rows and columns of a tile of the results
# Rows or columns that are multiplied at a time: 128 bytes, a row of swizzled shared memory.
_CONTRACTED = 64
_TILES: dict[str, Any] = {
    "block_m": _BLOCK,
    "block_n": _BLOCK,
    "block_k": _CONTRACTED,
    "max_concurrent_steps": 4,
    "grid_block_n": 1,
}


def capability() -> str | None:
    """Returns the compute capability of this process's GPUs, such as '9.0' of Hopper; None without a GPU."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # JAX has no GPU
        return None
    return getattr(device, "compute_capability", None)


def problem(rows_RX: jax.Array, kernel_EXY: jax.Array) -> str:
    """Returns why the kernels do not support the call, or ''."""
    if (found := capability()) != "9.0":
        return f"a GPU of compute capability {found}" if found else "an absent GPU"
    if not all(map(importlib.util.find_spec, _MODULES)):
        return "this version of JAX"
    if rows_RX.dtype != kernel_EXY.dtype or rows_RX.dtype not in (jnp.bfloat16, jnp.float16):
        return f"rows of {rows_RX.dtype} with kernels of {kernel_EXY.dtype}"
    R, (_, X, Y) = len(rows_RX), kernel_EXY.shape
    if R < _BLOCK or X % _BLOCK or Y % _BLOCK:
        return f"{R} rows with kernels [{X}, {Y}] (at least {_BLOCK}, and multiples of it)"
    if axes.free_mesh_axes():
        return (
            "a mesh whose axes split the model's own dimensions"  # XLA cannot split a Pallas kernel
        )
    return ""


def cost(num_experts: int, reason: str) -> str:
    """Returns what `jax.lax.ragged_dot` costs on a GPU, and why it is taken, as a warning."""
    return (
        f"The products of {num_experts} experts take {num_experts} times their FLOPs here, because on GPUs "
        f"jax.lax.ragged_dot multiplies all rows with all experts. The grouped kernel does not support {reason}: it "
        f"needs a Hopper GPU, bfloat16 or float16, and widths that are multiples of {_BLOCK}."
    )


@jax.custom_vjp
def hopper_matmul(rows_RX: jax.Array, kernel_EXY: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns the products of rows with their expert's kernel, [R, Y]; rows after the last expert's are zero.

    Products are summed in float32. `problem` must be ''.

    Args:
      sizes_E: int32, the number of rows of each expert.
    """
    return _products(rows_RX, kernel_EXY, sizes_E)


def _forward(rows_RX, kernel_EXY, sizes_E):
    return _products(rows_RX, kernel_EXY, sizes_E), (rows_RX, kernel_EXY, sizes_E)


def _backward(residuals, dy_RY):
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

    rows_RX, kernel_EXY, sizes_E = residuals
    # The kernel masks rows of other experts in one operand alone, by a product: the other one must be finite.
    dy_RY = _used(dy_RY, sizes_E)
    drows_RX = _products(dy_RY, kernel_EXY, sizes_E, transpose_rhs=True)
    dkernel_EXY = transposed_ragged_dot_mgpu.transposed_ragged_dot(
        _used(rows_RX, sizes_E), dy_RY, group_sizes=sizes_E, **_TILES
    )
    return drows_RX, dkernel_EXY, None


hopper_matmul.defvjp(_forward, _backward)


def _products(rows, kernel_EXY, sizes_E, *, transpose_rhs: bool = False) -> jax.Array:
    # Importing Pallas takes half a second, and only GPU programs need it.
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    out = ragged_dot_mgpu.ragged_dot(
        rows, kernel_EXY, group_sizes=sizes_E, transpose_rhs=transpose_rhs, **_TILES
    )
    return _used(out, sizes_E)


def _used(rows: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns the rows with zeros after the last expert's, where the kernel leaves memory as it was."""
    return jnp.where((jnp.arange(len(rows)) < sizes_E.sum())[:, None], rows, 0)
