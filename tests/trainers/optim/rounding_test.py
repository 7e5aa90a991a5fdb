"""Stochastic rounding against its closed form, and an optimiser that rounds so against one in float32."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier.trainers.optim import rounding

DRAWS = 1 << 14


def neighbours(x):
    """(the greatest bfloat16 number not above x in size, the next one in size), float64."""
    bits = np.float32(x).view(np.uint32)
    halves = np.array([bits >> 16, (bits >> 16) + 1], np.uint16)
    return halves.view(ml_dtypes.bfloat16).astype(np.float64)


@functools.cache
def draws():
    """For numbers of all sizes and both signs, their roundings [DRAWS, numbers]."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=64) * 10.0 ** rng.integers(-30, 30, 64), [1 + 2.0**-16]])
    x = jnp.asarray(x, jnp.float32)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    return np.asarray(x), np.asarray(jax.jit(jax.vmap(rounding.to_bfloat16, (None, 0)))(x, keys))


def test_a_number_goes_to_a_neighbour_and_its_mean_is_the_number():
    x, found = draws()
    for value, column in zip(x, found.T.astype(np.float64), strict=True):
        low, high = neighbours(value)
        assert set(np.unique(column)) <= {low, high}
        share = (np.float64(value) - low) / (high - low)
        # Of DRAWS independent draws; five standard deviations for 65 numbers.
        deviation = np.sqrt(share * (1 - share) / DRAWS)
        assert abs((column == high).mean() - share) <= 5 * deviation
        assert abs(column.mean() - value) <= 5 * deviation * abs(high - low)


def test_what_bfloat16_holds_and_what_is_not_finite_stay():
    x = jnp.array([0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    x = jnp.concatenate(
        [x, jax.lax.bitcast_convert_type(jnp.uint32(0x7F800001), jnp.float32)[None]]
    )
    for seed in range(8):
        found = rounding.to_bfloat16(x, jax.random.key(seed))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found.astype(jnp.float32), x)


PARAMS = {
    "narrow": jnp.linspace(0.5, 2.0, 512).astype(jnp.bfloat16).reshape(8, 64),
    "wide": jnp.linspace(-1.0, 1.0, 8),
}
GRADS = jax.tree.map(lambda x: jnp.cos(7 * x.astype(jnp.float32)).astype(x.dtype), PARAMS)
ADAM = optax.adamw(1e-4, b2=0.999)


def steps(optimizer, params, count, *, state=None, shardings=None):
    """[(parameters, state)] after each of `count` steps with the same gradient."""
    state = optimizer.init(params) if state is None else state
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), GRADS, params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    if shardings is not None:
        params = jax.device_put(params, shardings)
    found = []
    for _ in range(count):
        params, state = step(params, state)
        found.append((params, state))
    return found


def test_moments_are_float32_and_the_float32_parameters_are_those_without_rounding():
    *_, (params, state) = steps(rounding.stochastic(ADAM, seed=0), PARAMS, 12)
    wide = jax.tree.map(rounding.wide, PARAMS)
    *_, (reference, inner) = steps(ADAM, wide, 12)
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, PARAMS)
    assert {x.dtype for x in jax.tree.leaves(state.inner) if x.ndim} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(params["wide"], reference["wide"])
    # The moments follow from the gradients alone, so that they are those of the float32 run.
    jax.tree.map(np.testing.assert_array_equal, state.inner[0], inner[0])
    assert int(state.step) == 12


def test_the_mean_over_seeds_is_the_float32_run_where_rounding_to_nearest_does_not_move():
    count, seeds = 12, 400

    def run(seed):
        optimizer = rounding.stochastic(ADAM, seed=seed)
        params, state = {"narrow": PARAMS["narrow"]}, None
        grads = {"narrow": GRADS["narrow"]}
        state = optimizer.init(params)
        for _ in range(count):
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params["narrow"].astype(jnp.float32)

    found = np.asarray(jax.jit(jax.vmap(run))(jnp.arange(seeds)), np.float64)
    start = np.asarray(PARAMS["narrow"], np.float64)
    *_, (reference, _) = steps(ADAM, jax.tree.map(rounding.wide, PARAMS), count)
    moved = np.asarray(reference["narrow"], np.float64) - start
    # Of a step between neighbours, the variance is at most a quarter of their distance's square.
    spacing = np.spacing(np.asarray(start, np.float32)).astype(np.float64) * 2.0**16
    deviation = np.sqrt(count / (4 * seeds)) * spacing
    # A little decay depends on the rounded parameter, hence on the draws, but hardly.
    assert np.all(np.abs(found.mean(0) - start - moved) <= 5 * deviation)
    assert abs((found.mean(0) - start).mean() - moved.mean()) <= 5 * deviation.max() / np.sqrt(512)
    *_, (nearest, _) = steps(ADAM, PARAMS, count)
    assert np.mean(np.asarray(nearest["narrow"], np.float64) == start) > 0.9


def test_a_restart_and_a_mesh_round_alike():
    optimizer = rounding.stochastic(ADAM, seed=3)
    whole = steps(optimizer, PARAMS, 6)
    params, state = jax.device_get(whole[2])
    rest = steps(optimizer, params, 3, state=state)
    for one, other in zip(whole[3:], rest, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    shardings = {
        "narrow": NamedSharding(mesh, PartitionSpec("b", "a")),
        "wide": NamedSharding(mesh, PartitionSpec()),
    }
    split = steps(optimizer, PARAMS, 6, shardings=shardings)
    for (one, _), (other, _) in zip(whole, split, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    other_seed = steps(rounding.stochastic(ADAM, seed=4), PARAMS, 1)
    assert np.any(np.asarray(other_seed[0][0]["narrow"]) != np.asarray(whole[0][0]["narrow"]))


@pytest.mark.parametrize(
    ("setting", "dtype", "problem"),
    [
        (
            "stochastic",
            "float32",
            r"Recipe.rounding = 'stochastic' has no effect: .* Set it to None",
        ),
        ("nearest", "float32", r"Recipe.rounding = 'nearest' has no effect"),
        ("stochastic", "float16", r"is for bfloat16, and trained parameters are float16"),
    ],
)
def test_a_rounding_without_effect_or_form_is_refused(setting, dtype, problem):
    params = {"w": jnp.ones(3, dtype), "frozen": jnp.ones(3, jnp.bfloat16)}
    narrow = rounding.narrow_dtypes(params, {"w": True, "frozen": False})
    with pytest.raises(ValueError, match=problem):
        rounding.check(setting, narrow)
    rounding.check(None, narrow)
