"""The mean of a run's last states: a linear merge of them, while training stays as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model.transforms import merge
from espalier.trainers.optim import recent_mean
from espalier.trainers.optim.recent_mean import RecentMean

EVERY, WINDOW, STEPS = 2, 3, 11


def sgd(*, learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)


@functools.cache
def trained(every=EVERY, window=WINDOW):
    """(optimiser, parameters and states after 0, 1, ... updates)."""
    optimizer = recent_mean.recent_mean(
        learning_rate=0.1, param_axes=None, optimizer=sgd, every=every, window=window
    )
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "still": jnp.full(4, 0.1)}
    state, seen = optimizer.init(params), []
    for _ in range(STEPS + 1):
        seen.append((params, state))
        grads = {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "still": jnp.zeros(4)}
        params, state = step(optimizer, params, state, grads)
    return optimizer, seen


def step(optimizer, params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def test_the_mean_is_the_linear_merge_of_the_last_states():
    _, seen = trained()
    for count, (params, state) in enumerate(seen):
        average = recent_mean.mean_of(state, params)
        last = [seen[i][0] for i in range(EVERY, count + 1, EVERY)][-WINDOW:]
        if not last:
            jax.tree.map(np.testing.assert_array_equal, average, params)
            continue
        for name in params:
            arrays = [np.asarray(x[name]) for x in last]
            values = {"weight": [1.0] * len(last), "normalize": True}
            job = merge.Job(
                method="linear",
                name=name,
                shape=arrays[0].shape,
                based=False,
                values=values,
                models=["x"] * len(last),
            )
            np.testing.assert_allclose(average[name], merge.merged(job, arrays), atol=1e-6)
        np.testing.assert_array_equal(average["still"], params["still"])


def test_training_is_that_of_the_optimiser_alone():
    _, seen = trained()
    alone = sgd(learning_rate=0.1)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "still": jnp.full(4, 0.1)}
    state = alone.init(params)
    for expected, _ in seen:
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        grads = {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "still": jnp.zeros(4)}
        params, state = step(alone, params, state, grads)


def test_the_state_is_a_tree_that_goes_on_within_a_window():
    optimizer, seen = trained()
    params, state = jax.tree.map(np.asarray, seen[7])  # as a checkpoint restores it
    assert isinstance(state, RecentMean) and len(state.states) == WINDOW
    grads = jax.tree.map(jnp.ones_like, params)
    outs = [step(optimizer, *x, grads) for x in ((params, state), seen[7])]
    jax.tree.map(np.testing.assert_array_equal, *outs)


def test_another_optimiser_has_no_mean():
    with pytest.raises(ValueError, match="needs the optimiser"):
        recent_mean.mean_of(sgd(learning_rate=0.1).init({"w": jnp.ones(2)}), {"w": jnp.ones(2)})
