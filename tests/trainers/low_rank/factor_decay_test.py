"""Decay of factors and of their product, against closed forms, autodiff and float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model import axes
from espalier.model.low_rank import factors, lowrank
from espalier.trainers.low_rank import factor_decay
from espalier.trainers.optim import optimizers
from espalier.trainers.optim.gradient_terms import ParamAxes, make_optimizer

U = jax.random.normal(jax.random.key(0), (9, 4))
V = jax.random.normal(jax.random.key(1), (4, 7))
PARAMS = {"a": {"u": U, "v": V}, "b": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
BOXED = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (axes.UNMODELED,) * leaf.ndim), PARAMS)


def optimizer(term, *, learning_rate, factory=optimizers.adamw):
    """`factory`'s optimiser with a gradient term, as a recipe makes it."""
    return make_optimizer(factory, learning_rate=learning_rate, boxed_params=BOXED, terms=[term])


def product_norm(u, v):
    return 0.5 * jnp.sum((u @ v) ** 2)


def test_frobenius_decay_is_the_gradient_of_the_products_norm():
    by_autodiff = jax.grad(product_norm, argnums=(0, 1))(U, V)
    for found, expected in zip(factors.frobenius_decay(U, V), by_autodiff, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    stacked = jnp.stack([U, 2 * U]), jnp.stack([V, V])
    np.testing.assert_allclose(
        factors.frobenius_decay(*stacked)[0][0], factors.frobenius_decay(U, V)[0], rtol=1e-5
    )


def test_l2_bounds_the_nuclear_norm_and_meets_it_where_factors_are_balanced():
    nuclear = np.linalg.svd(np.asarray(U @ V, np.float64), compute_uv=False).sum()
    assert 0.5 * float((U**2).sum() + (V**2).sum()) > nuclear
    u, v = factors.spectral_factors(U @ V, 4)
    assert 0.5 * float((u**2).sum() + (v**2).sum()) == pytest.approx(nuclear, rel=1e-4)


def test_outputs_and_frobenius_decay_do_not_see_the_gauge_and_l2_does():
    turn = jnp.linalg.qr(jax.random.normal(jax.random.key(5), (4, 4)))[0]
    gauge = turn @ jnp.diag(jnp.array([2.0, 0.5, 1.0, 3.0])) @ turn[::-1]
    u, v = U @ gauge, jnp.linalg.inv(gauge) @ V
    x = jax.random.normal(jax.random.key(6), (20, 9))
    np.testing.assert_allclose(lowrank.product(x, u, v), lowrank.product(x, U, V), atol=1e-4)

    def value(u, v):  # of degree one in U: (1/2) |U V^T|^2 is half of <U, its gradient>
        return 0.5 * float((u * factors.frobenius_decay(u, v)[0]).sum())

    direct = 0.5 * np.square(np.asarray(U, np.float64) @ np.asarray(V, np.float64)).sum()
    assert value(U, V) == pytest.approx(direct, rel=1e-5)
    assert value(u, v) == pytest.approx(direct, rel=1e-4)
    assert abs(float((u**2).sum() + (v**2).sum() - (U**2).sum() - (V**2).sum())) > 1


def test_frobenius_decay_forms_no_product():
    u, v = jnp.ones((40, 3)), jnp.ones((3, 50))
    jaxpr = str(jax.make_jaxpr(factors.frobenius_decay)(u, v))
    assert "40,50" not in jaxpr and "50,40" not in jaxpr and "3,3" in jaxpr


def test_singular_values_are_those_of_the_product_and_bound_the_effective_rank():
    exact = np.linalg.svd(np.asarray(U, np.float64) @ np.asarray(V, np.float64), compute_uv=False)
    found = factors.singular_values(U, V)
    np.testing.assert_allclose(found, exact[:4], rtol=1e-5)
    assert float(factors.effective_rank(found)) == pytest.approx(exact.sum() / exact[0], rel=1e-5)
    assert 1 <= float(factors.effective_rank(found)) <= 4
    assert float(factors.effective_rank(jnp.zeros(4))) == 0


def test_a_step_of_sgd_on_a_layer_moves_its_product_as_written_out():
    rate, target = 0.01, jax.random.normal(jax.random.key(2), (11, 7))
    x = jax.random.normal(jax.random.key(3), (11, 9))
    layer = lowrank.LowRankDense(
        features=7,
        axes=(axes.EMBED, axes.MLP),
        factorisation=lowrank.Factorisation(rank=4, rank_rule="absolute", layers=(".*",)),
    )
    sgd = optimizers.sgd(
        learning_rate=rate, param_axes=ParamAxes({"u": ("embed", "rank"), "v": ("rank", "mlp")})
    )
    params = {"u": U, "v": V}
    grads = jax.grad(lambda p: 0.5 * ((layer.apply({"params": p}, x) - target) ** 2).sum())(params)
    updates, _ = sgd.update(grads, sgd.init(params), params)
    moved = optax.apply_updates(params, updates)
    u, v, x, target = (np.asarray(a, np.float64) for a in (U, V, x, target))
    w = u @ v
    grad = x.T @ (x @ w - target)  # of the loss in W
    expected = w - rate * (grad @ v.T @ v + u @ u.T @ grad) + rate**2 * grad @ w.T @ grad
    np.testing.assert_allclose(moved["u"] @ moved["v"], expected, atol=1e-4)
    assert np.abs(expected - w).max() > 0.1


@pytest.mark.parametrize("kind", ["l2", "frobenius"])
def test_coupled_decay_is_part_of_the_gradient_and_nothing_else_changes(kind):
    made = optimizer(
        factor_decay.factor_decay(kind=kind, weight=0.01),
        learning_rate=0.5,
        factory=functools.partial(optimizers.sgd, weight_decay=0.1),
    )
    updates, _ = made.update(ZEROS, made.init(PARAMS), PARAMS)
    expected = (U, V) if kind == "l2" else factors.frobenius_decay(U, V)
    np.testing.assert_allclose(updates["a"]["u"], -0.5 * 0.01 * expected[0], rtol=1e-5)
    np.testing.assert_allclose(updates["a"]["v"], -0.5 * 0.01 * expected[1], rtol=1e-5)
    np.testing.assert_allclose(updates["b"]["kernel"], -0.5 * 0.1 * PARAMS["b"]["kernel"])
    assert not updates["b"]["bias"].any()


def test_two_steps_of_sgd_with_frobenius_decay_are_those_written_out():
    rate, weight, momentum = 0.5, 0.01, 0.9
    made = optimizer(
        factor_decay.factor_decay(weight=weight),
        learning_rate=rate,
        factory=functools.partial(
            optimizers.sgd, momentum=momentum, weight_decay=0.1, coupled=True
        ),
    )
    params, state = PARAMS, made.init(PARAMS)
    u, v, kernel = (np.asarray(x, np.float64) for x in (U, V, PARAMS["b"]["kernel"]))
    trace_u, trace_v, trace_kernel = np.zeros_like(u), np.zeros_like(v), np.zeros_like(kernel)
    for seed in (3, 4):
        keys = jax.random.split(jax.random.key(seed), 3)
        grads = {
            "a": {
                "u": jax.random.normal(keys[0], U.shape),
                "v": jax.random.normal(keys[1], V.shape),
            },
            "b": {"kernel": jax.random.normal(keys[2], (3, 3)), "bias": jnp.ones(3)},
        }
        updates, state = made.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        # The product's decay joins the gradient before the momentum; u and v have no other.
        trace_u = momentum * trace_u + np.asarray(grads["a"]["u"]) + weight * u @ (v @ v.T)
        trace_v = momentum * trace_v + np.asarray(grads["a"]["v"]) + weight * (u.T @ u) @ v
        trace_kernel = momentum * trace_kernel + np.asarray(grads["b"]["kernel"]) + 0.1 * kernel
        u, v, kernel = u - rate * trace_u, v - rate * trace_v, kernel - rate * trace_kernel
    for found, want in zip(
        (params["a"]["u"], params["a"]["v"], params["b"]["kernel"]), (u, v, kernel), strict=True
    ):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_decoupled_decay_follows_the_schedule_and_is_not_normalised_by_adam():
    rate = optax.linear_schedule(1.0, 0.0, 2)
    made = optimizer(factor_decay.factor_decay(weight=0.01, coupled=False), learning_rate=rate)
    state = made.init(PARAMS)
    for factor in (1.0, 0.5, 0.0):
        updates, state = made.update(ZEROS, state, PARAMS)
        expected = -factor * 0.01 * factors.frobenius_decay(U, V)[0]
        np.testing.assert_allclose(updates["a"]["u"], expected, rtol=1e-5, atol=1e-9)


def test_frozen_factors_are_left_alone():
    made = factor_decay.add_decay("frobenius", 1.0)
    frozen = {"a": {"u": U, "v": None}, "b": PARAMS["b"]}
    updates, _ = made.update(frozen, made.init(frozen), frozen)
    assert (updates["a"]["u"] == U).all() and updates["a"]["v"] is None


def test_no_decay_is_no_decay_of_adamw_either():
    made = optimizer(factor_decay.factor_decay(kind="none"), learning_rate=0.5)
    updates, _ = made.update(ZEROS, made.init(PARAMS), PARAMS)
    assert not updates["a"]["u"].any() and updates["b"]["kernel"].any()
    with pytest.raises(ValueError, match="kind = 'nuclear': choose from 'none'"):
        factor_decay.factor_decay(kind="nuclear")


def test_an_optimiser_that_would_decay_factors_too_is_refused():
    term = factor_decay.factor_decay()
    with pytest.raises(ValueError, match=r"OPTIMIZER = adamw has no parameter `param_axes`.*named"):
        optimizer(term, learning_rate=0.5, factory=optax.adamw)
    made = make_optimizer(optax.adamw, learning_rate=0.5, boxed_params=BOXED)
    assert jax.tree.leaves(made.init(PARAMS))
