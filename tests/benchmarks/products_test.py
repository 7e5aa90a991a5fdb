"""The products of a step are those of its trace, as often as it computes them."""

import jax
import jax.numpy as jnp
import pytest

from tests.benchmarks import products, t5
from tests.benchmarks.jax import t5_jax
from tests.benchmarks.step_side import StepSide


def test_products_of_loops_count_by_length_and_unused_ones_do_not():
    def loss(kernel, frozen, x):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ kernel), None), x, length=3)
        return jnp.sum(jnp.tanh(x @ frozen)) + jnp.vdot(x, x)

    def used(kernel, frozen, x):
        return jax.grad(loss, (0, 1))(kernel, frozen, x)[0]

    arguments = jnp.ones((4, 4)), jnp.ones((4, 2)), jnp.ones((5, 4))
    counts = products.products_of(jax.make_jaxpr(used)(*arguments).jaxpr)
    # Three forward, and two backward for each; the gradient of `frozen` is dropped.
    assert counts.total() == 3 + 6 + 2
    assert products._timed(counts)() > 0

    def loop(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="'while'"):
        products.products_of(jax.make_jaxpr(loop)(jnp.ones((4, 4))).jaxpr)


def test_a_step_is_compared_with_its_products():
    small = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 24}
    sizes = {**t5.CASE, **products._TINY, **small, "vocab_size": 64}
    side = StepSide(t5_jax.recipe_of(sizes), products._Examples(sizes), jax.devices()[:1])
    figures = products._compare(side, 2)
    # One product forward and two backward for each kernel: four of each attention, three of each MLP, and the head.
    assert figures["products"] > 3 * (3 * 4 + 2 * 3 + 1)
    assert figures["products_over_step"]["pairs"] == 2
