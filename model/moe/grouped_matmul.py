"""Products of rows, sorted by expert, with the kernels of their experts, by the kernel that the platform has.

Shapes: R rows, E experts, X in, Y out.
"""

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from espalier.model import axes
from espalier.model.kernels import int8
from espalier.model.kernels.platform import reference_forms, target_platform
from espalier.model.moe import parallel
from espalier.model.moe.row_blocks import kernel_gradient, over_blocks, product, rows_gradient

# XLA cannot split a Pallas kernel, so that it must be in a `shard_map`, see model/moe/parallel.py.
_SPLIT_BY_XLA = "a mesh that does not divide the rows, the experts or their width"


def grouped_matmul(
    rows_RX: jax.Array,
    kernel_EXY: jax.Array,
    sizes_E: jax.Array,
    *,
    names: Sequence[str] = (axes.UNMODELED, axes.UNMODELED),
) -> jax.Array:
    """Returns the products of rows, sorted by expert, with their expert's kernel, [R, Y].

    On TPUs this is jax.lax.ragged_dot, with the gradient of the kernels by megablox. Where XLA would have to split that,
    the gradient takes E times its FLOPs, with one warning. On CPUs and GPUs ragged_dot multiplies every row with
    every expert. On a CPU a loop multiplies blocks of rows instead, as many as the sizes need. On a Hopper GPU a Pallas
    kernel does; other GPUs, and calls that it does not support, take ragged_dot with one warning of the cost. Results for rows after the last expert's rows are undefined.

    Args:
      sizes_E: number of rows of each expert, at most R in total; or [G, E / devices of an expert axis]
        if the rows are on G devices (see model/moe/parallel.py).
      names: logical names of the kernel's last two dimensions, of which a mesh may split one; by default both are whole.
    """
    if sizes_E.ndim == 2:
        return parallel.per_device(grouped_matmul, rows_RX, kernel_EXY, sizes_E, names)
    sizes_E = sizes_E.astype(jnp.int32)
    form = _choose(rows_RX, kernel_EXY)
    if form == "blocks":
        return _blocks(rows_RX, kernel_EXY, sizes_E)
    kernel_EXY = kernel_EXY.astype(rows_RX.dtype)
    if form == "megablox":
        return tpu_matmul(rows_RX, kernel_EXY, sizes_E)
    if form == "hopper":
        return hopper_matmul(rows_RX, kernel_EXY, sizes_E)
    return jax.lax.ragged_dot(rows_RX, kernel_EXY, sizes_E)


def scaled_matmul(
    rows_RX: jax.Array,
    kernel_EXY: jax.Array,
    scale_EY: jax.Array,
    sizes_E: jax.Array,
    *,
    names: Sequence[str] = (axes.UNMODELED, axes.UNMODELED),
) -> jax.Array:
    """Returns `grouped_matmul` with int8 kernels (model/kernels/int8.py) and the scales of their outputs."""
    if sizes_E.ndim == 2:
        return parallel.per_device(scaled_matmul, rows_RX, kernel_EXY, sizes_E, names, scale_EY)
    dtype, rows_RX = rows_RX.dtype, rows_RX.astype(int8.summed(rows_RX))
    # Within the loop over new tokens, or XLA would store the converted kernels before it.
    kernel_EXY, rows_RX = jax.lax.optimization_barrier((kernel_EXY, rows_RX))
    y_RY = grouped_matmul(rows_RX, kernel_EXY, sizes_E)
    experts_E = jnp.arange(len(scale_EY))
    experts_R = jnp.repeat(experts_E, sizes_E, total_repeat_length=len(y_RY))
    return (y_RY * scale_EY[experts_R]).astype(dtype)


def _choose(
    rows_RX: jax.Array, kernel_EXY: jax.Array
) -> Literal["blocks", "hopper", "megablox", "ragged_dot"]:
    """Returns the form for the target platform; warns of the cost of ragged_dot."""
    if reference_forms():
        return "ragged_dot"
    if target_platform() == "cpu":
        return "blocks"
    if target_platform() == "gpu":
        problem = hopper_problem(rows_RX, kernel_EXY)
        if not problem:
            return "hopper"
        _warn(ragged_dot_cost(len(kernel_EXY), problem))
    if target_platform() == "tpu":
        if not axes.free_mesh_axes():
            return "megablox"
        _warn(
            f"The gradient of the kernels of {len(kernel_EXY)} experts takes {len(kernel_EXY)} times its FLOPs here, because "
            f"XLA multiplies all rows for every expert. megablox does not support {_SPLIT_BY_XLA}."
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


# ---- NVIDIA Hopper: JAX's Pallas kernels for Mosaic GPU, with a gradient of the same kernels. Elsewhere on GPUs ragged_dot
# becomes one product of all rows with all experts' kernels, most of it zeros.

# Experimental modules of JAX, which a version may lack.
_HOPPER_MODULES = tuple(
    f"jax.experimental.pallas.ops.gpu.{name}_mgpu"
    for name in ("ragged_dot", "transposed_ragged_dot")
)
_HOPPER_BLOCK = 128  # rows and columns of a tile of the results
# Rows or columns that are multiplied at a time: 128 bytes, a row of swizzled shared memory.
_HOPPER_CONTRACTED = 64
_HOPPER_TILES: dict[str, Any] = {
    "block_m": _HOPPER_BLOCK,
    "block_n": _HOPPER_BLOCK,
    "block_k": _HOPPER_CONTRACTED,
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


def hopper_problem(rows_RX: jax.Array, kernel_EXY: jax.Array) -> str:
    """Returns why the kernels do not support the call, or ''."""
    if (found := capability()) != "9.0":
        return f"a GPU of compute capability {found}" if found else "an absent GPU"
    if not all(map(importlib.util.find_spec, _HOPPER_MODULES)):
        return "this version of JAX"
    if rows_RX.dtype != kernel_EXY.dtype or rows_RX.dtype not in (jnp.bfloat16, jnp.float16):
        return f"rows of {rows_RX.dtype} with kernels of {kernel_EXY.dtype}"
    R, (_, X, Y) = len(rows_RX), kernel_EXY.shape
    if R < _HOPPER_BLOCK or X % _HOPPER_BLOCK or Y % _HOPPER_BLOCK:
        return f"{R} rows with kernels [{X}, {Y}] (at least {_HOPPER_BLOCK}, and multiples of it)"
    if axes.free_mesh_axes():
        return _SPLIT_BY_XLA
    return ""


def ragged_dot_cost(num_experts: int, reason: str) -> str:
    """Returns what `jax.lax.ragged_dot` costs on a GPU, and why it is taken, as a warning."""
    return (
        f"The products of {num_experts} experts take {num_experts} times their FLOPs here, because on GPUs "
        f"jax.lax.ragged_dot multiplies all rows with all experts. The grouped kernel does not support {reason}: it "
        f"needs a Hopper GPU, bfloat16 or float16, and widths that are multiples of {_HOPPER_BLOCK}."
    )


@jax.custom_vjp
def hopper_matmul(rows_RX: jax.Array, kernel_EXY: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns the products of rows with their expert's kernel, [R, Y]; rows after the last expert's are zero.

    Products are summed in float32. `hopper_problem` must be ''.

    Args:
      sizes_E: int32, the number of rows of each expert.
    """
    return _hopper_products(rows_RX, kernel_EXY, sizes_E)


def _hopper_fwd(rows_RX, kernel_EXY, sizes_E):
    return _hopper_products(rows_RX, kernel_EXY, sizes_E), (rows_RX, kernel_EXY, sizes_E)


def _hopper_bwd(residuals, dy_RY):
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

    rows_RX, kernel_EXY, sizes_E = residuals
    # The kernel masks rows of other experts in one operand alone, by a product: the other one must be finite.
    dy_RY = _used(dy_RY, sizes_E)
    drows_RX = _hopper_products(dy_RY, kernel_EXY, sizes_E, transpose_rhs=True)
    dkernel_EXY = transposed_ragged_dot_mgpu.transposed_ragged_dot(
        _used(rows_RX, sizes_E), dy_RY, group_sizes=sizes_E, **_HOPPER_TILES
    )
    return drows_RX, dkernel_EXY, None


hopper_matmul.defvjp(_hopper_fwd, _hopper_bwd)


def _hopper_products(rows, kernel_EXY, sizes_E, *, transpose_rhs: bool = False) -> jax.Array:
    # Importing Pallas takes half a second, and only GPU programs need it.
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    out = ragged_dot_mgpu.ragged_dot(
        rows, kernel_EXY, group_sizes=sizes_E, transpose_rhs=transpose_rhs, **_HOPPER_TILES
    )
    return _used(out, sizes_E)


def _used(rows: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns the rows with zeros after the last expert's, where the kernel leaves memory as it was."""
    return jnp.where((jnp.arange(len(rows)) < sizes_E.sum())[:, None], rows, 0)


# ---- TPU: XLA's product and gradient of rows, with megablox for the gradient of the kernels, for which XLA would mask all rows
# for every expert and multiply them.

_MEGABLOX_ROWS = 128  # of a tile; tiles that two experts share are multiplied for both
_MEGABLOX_COLUMNS = 512  # of a tile, at most


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def tpu_matmul(
    rows_RX: jax.Array, kernel_EXY: jax.Array, sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
    """Returns the products of rows with their expert's kernel, [R, Y]; see `grouped_matmul`. No mesh axis may be free.

    Args:
      sizes_E: int32, the number of rows of each expert.
      interpret: whether the kernel of the gradient runs in JAX's interpreter, for tests.
    """
    return jax.lax.ragged_dot(rows_RX, kernel_EXY, sizes_E)


def _megablox_fwd(rows_RX, kernel_EXY, sizes_E, interpret):
    del interpret
    out_RY = jax.lax.ragged_dot(rows_RX, kernel_EXY, sizes_E)
    return out_RY, (rows_RX, kernel_EXY, sizes_E)


def _megablox_bwd(interpret, residuals, dy_RY):
    # Importing Pallas takes half a second, and only these programs need it.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows_RX, kernel_EXY, sizes_E = residuals
    _, pull = jax.vjp(lambda rows: jax.lax.ragged_dot(rows, kernel_EXY, sizes_E), rows_RX)
    (drows_RX,) = pull(dy_RY)
    missing = -len(rows_RX) % _MEGABLOX_ROWS
    rows, dy = (jnp.pad(x, ((0, missing), (0, 0))) for x in (rows_RX, dy_RY))
    dkernel_EXY = tgmm(
        rows.T,
        dy.astype(rows.dtype),
        sizes_E,
        kernel_EXY.dtype,
        (_MEGABLOX_ROWS, *(min(_MEGABLOX_COLUMNS, width) for width in kernel_EXY.shape[1:])),
        interpret=interpret,
    )
    return drows_RX, dkernel_EXY, None


tpu_matmul.defvjp(_megablox_fwd, _megablox_bwd)
