"""Grouped products against loops over experts in float64, and what the blocks of the CPU form cover."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels.platform import use_platform, use_reference_forms
from model.moe import grouped_matmul as form

X, Y = 5, 3

SIZES = [
    (7, 0, 0),
    (0, 0, 7),
    (3, 0, 4),
    (16, 33, 0, 1),
    (0, 300, 40, 15, 17),  # a whole block of 256 and the smaller ones
    (1,) * 20,
]


def operands(sizes, unused=0):
    rows = sum(sizes) + unused
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, X), (len(sizes), X, Y), (rows, Y))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def by_loops(rows, kernel, direction, sizes):
    """Products, and the gradients of their sum along a direction, in float64."""
    rows, kernel, direction = (np.asarray(a, np.float64) for a in (rows, kernel, direction))
    out, drows, dkernel = np.zeros_like(direction), np.zeros_like(rows), np.zeros_like(kernel)
    start = 0
    for expert, size in enumerate(sizes):
        own = slice(start, start + size)
        out[own] = rows[own] @ kernel[expert]
        drows[own] = direction[own] @ kernel[expert].T
        dkernel[expert] = rows[own].T @ direction[own]
        start += size
    return out, drows, dkernel


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("sizes", "unused"), [*((sizes, 0) for sizes in SIZES), (SIZES[3], 6)])
def test_values_and_gradients(platform, sizes, unused):
    rows, kernel, direction = operands(sizes, unused)
    used = (np.arange(len(rows)) < sum(sizes)).reshape(-1, 1)
    want = by_loops(rows, kernel, direction, sizes)

    def along(rows, kernel):
        out = form.grouped_matmul(rows, kernel, jnp.asarray(sizes))
        out = jnp.where(used, out, 0)
        return jnp.sum(out * direction), out

    with use_platform(platform):
        grads, out = jax.jit(jax.grad(along, argnums=(0, 1), has_aux=True))(rows, kernel)
    for got, expected in zip((out, *grads), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("sizes", SIZES)
def test_blocks_cover_every_row_once_and_few_more(sizes):
    rows = sum(sizes)

    def count(expert, block, own, state):
        seen, of_expert, multiplied = state
        seen = block.put(seen, block(seen) + own)
        of_expert = block.put(of_expert, jnp.where(own, expert, block(of_expert)))
        return seen, of_expert, multiplied + block.length

    zeros = jnp.zeros((rows, 1), jnp.int32)
    seen, of_expert, multiplied = form._over_blocks(
        count, jnp.asarray(sizes), rows, (zeros, zeros, 0)
    )
    np.testing.assert_array_equal(seen, 1)
    np.testing.assert_array_equal(of_expert[:, 0], np.repeat(np.arange(len(sizes)), sizes))
    assert int(multiplied) <= sum(-(-size // 16) * 16 for size in sizes)


def test_reference_forms_differentiate_twice():
    sizes = (3, 0, 4)
    rows, kernel, _ = operands(sizes)

    def value(rows):
        return jnp.sum(form.grouped_matmul(rows, kernel, jnp.asarray(sizes)) ** 2)

    with use_platform("cpu"), use_reference_forms():
        _, along = jax.jvp(jax.grad(value), (rows,), (rows,))
    # The Hessian of |r K|^2 along r is 2 r K K^T.
    out, _, _ = by_loops(rows, kernel, np.zeros((7, Y)), sizes)
    want = by_loops(rows, kernel, 2 * out, sizes)[1]
    np.testing.assert_allclose(along, want, atol=1e-4)


def test_half_precision_stays():
    rows, kernel, _ = (a.astype(jnp.bfloat16) for a in operands((3, 4)))
    out, pull = jax.vjp(lambda r, k: form.grouped_matmul(r, k, jnp.array([3, 4])), rows, kernel)
    assert out.dtype == jnp.bfloat16
    assert [g.dtype for g in pull(out)] == [jnp.bfloat16] * 2
