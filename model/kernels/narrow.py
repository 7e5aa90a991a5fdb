"""Products with large matrices of 16-bit or 8-bit numbers on a CPU, and rows of them, where no gradient is needed.

XLA's CPU backend multiplies such numbers as float32, and first converts whole matrices: a step of decoding with a model of 1B
parameters in bfloat16 writes 5 GB for it. Here a loop converts a block of outputs at a time, which stays in the processor's cache.

Shapes: I inputs, O outputs, X rows of x, E matrices of a stack, V rows of a table, D width, '...' any leading.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from espalier.model import axes
from espalier.model.kernels.platform import reference_forms, target_platform

_BLOCK = 2**20  # numbers of a block, 4 MB in float32


def applies(matrix: jax.Array) -> bool:
    """Returns whether the functions of this module are to be used for a matrix."""
    return (
        target_platform() == "cpu"
        and not reference_forms()
        and matrix.dtype.itemsize <= 2
        and matrix.size > _BLOCK
        and not axes.free_mesh_axes()
    )


def product(x: jax.Array, matrix: jax.Array, outputs: int) -> jax.Array:
    """Returns the products of x [..., I] with a matrix, float32 [..., O].

    Args:
      matrix: [I, O] with `outputs` 1, or [O, I] with `outputs` 0.
    """
    y_XO = _product(x.reshape(-1, x.shape[-1]), matrix, outputs)
    return y_XO.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x_XI: jax.Array, matrix: jax.Array, outputs: int) -> jax.Array:
    return _by_blocks(x_XI, matrix[None], jnp.zeros((), jnp.int32), outputs)


def product_of(x_XI: jax.Array, stack_EIO: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the products of x with one matrix of a stack, float32 [X, O]; they have no gradient."""
    return _by_blocks(x_XI, stack_EIO, index, 1)


@functools.partial(jax.jit, static_argnums=3)  # traced once for the layers of a model
def _by_blocks(x_XI: jax.Array, stack: jax.Array, index: jax.Array, outputs: int) -> jax.Array:
    shape = list(stack.shape[1:])
    count = shape[outputs]
    length = shape[outputs] = min(count, max(1, _BLOCK // shape[1 - outputs]))
    x_XI = x_XI.astype(jnp.float32)

    def add(number: jax.Array, y_XO: jax.Array) -> jax.Array:
        # The last block begins earlier where it would end beyond the matrix.
        start = jnp.minimum(number * length, count - length)

        def part():
            at = (index, 0, start) if outputs else (index, start, 0)
            bits = jax.lax.dynamic_slice(_bits(stack), at, (1, *shape))[0]
            block = jax.lax.bitcast_convert_type(bits, stack.dtype).astype(jnp.float32)
            return jax.lax.dot_general(x_XI, block, (((1,), (1 - outputs,)), ((), ())))

        y = _within_a_condition(number >= 0, part)
        return jax.lax.dynamic_update_slice_in_dim(y_XO, y, start, 1)

    y_XO = jnp.zeros((len(x_XI), count), jnp.float32)
    return jax.lax.fori_loop(0, -(-count // length), add, y_XO)


@jax.custom_vjp
def rows(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the rows [..., D] of a table [V, D]; ids outside of it are clipped to its ends."""
    flat = jnp.clip(ids.reshape(-1), 0, len(table_VD) - 1)

    def add(number: jax.Array, bits: jax.Array) -> jax.Array:
        row = _within_a_condition(
            flat[number] >= 0,
            lambda: jax.lax.dynamic_slice_in_dim(_bits(table_VD), flat[number], 1),
        )
        return jax.lax.dynamic_update_slice_in_dim(bits, row, number, 0)

    bits = jnp.zeros((len(flat), table_VD.shape[1]), jnp.uint16)
    bits = jax.lax.fori_loop(0, len(flat), add, bits)
    return jax.lax.bitcast_convert_type(bits, table_VD.dtype).reshape(*ids.shape, -1)


def _bits(matrix: jax.Array) -> jax.Array:
    """Returns the integers of narrow numbers. XLA makes float32 of a whole bfloat16 array before it takes a slice or rows of it."""
    return jax.lax.bitcast_convert_type(matrix, f"uint{8 * matrix.dtype.itemsize}")


def _within_a_condition(true: jax.Array, compute: Callable[[], jax.Array]) -> jax.Array:
    """Returns `compute()`, in a branch: XLA would move what it makes of whole matrices out of the loop of decoding, and store it.

    `true` must be so, in a way that XLA does not see.
    """
    shape = jax.eval_shape(compute)
    return jax.lax.cond(true, compute, lambda: jnp.zeros(shape.shape, shape.dtype))


def _rows_forward(table_VD, ids):
    return jax.vjp(lambda table_VD: jnp.take(table_VD, ids, axis=0, mode="clip"), table_VD)


def _rows_backward(pullback, dy):
    return (*pullback(dy), None)


rows.defvjp(_rows_forward, _rows_backward)


def _plain(x_XI: jax.Array, matrix: jax.Array, outputs: int) -> jax.Array:
    dims = (((1,), (1 - outputs,)), ((), ()))
    return jax.lax.dot_general(x_XI, matrix, dims, preferred_element_type=jnp.float32)


def _forward(x_XI, matrix, outputs):
    return jax.vjp(functools.partial(_plain, outputs=outputs), x_XI, matrix)


def _backward(outputs, pullback, dy_XO):
    del outputs
    return pullback(dy_XO)


_product.defvjp(_forward, _backward)
