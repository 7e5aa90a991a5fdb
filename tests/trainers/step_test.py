"""The train step on a model small enough to check by hand: weighted least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainers import trainable
from trainers.anomaly import STATISTICS, Anomaly
from trainers.objectives.base import LossOut
from trainers.step import make_train_step
from trainers.train_state import TrainState

pytestmark = pytest.mark.smoke

W = np.array([[1.0, -2.0], [0.5, 3.0], [2.0, 0.0]], np.float32)


def loss_fn(params, batch, rng):
    error = batch["x"] @ params["w"] + params["b"].reshape(1, -1) - batch["y"]
    total = (batch["weight"] * (error**2).sum(-1)).sum()
    weight = batch["weight"].sum()
    return LossOut(sum=total, weight=weight, metrics={"loss": (total, weight)})


def make_batch(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    weight = rng.integers(0, 4, rows).astype(np.float32)
    return {"x": x, "y": x @ W, "weight": weight}


def make_state(optimizer, *, anomaly=None, ema=False, mask=None):
    params = {"w": jnp.zeros((3, 2)), "b": jnp.ones(2)}
    trained = params if mask is None else trainable.split(params, mask)[0]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(trained),
        ema_params=params if ema else None,
        variables={STATISTICS: anomaly.init()} if anomaly else {},
    )


def closed_form_gradient(params, batch):
    x, y, weight = (np.asarray(batch[k], np.float64) for k in ("x", "y", "weight"))
    error = x @ np.asarray(params["w"], np.float64) + np.asarray(params["b"]) - y
    scaled = 2 * weight[:, None] * error / weight.sum()
    return {"w": x.T @ scaled, "b": scaled.sum(0)}


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_update_is_the_closed_form_for_any_accumulation(microbatches):
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(loss_fn=loss_fn, optimizer=optimizer, microbatches=microbatches))
    state, batch = make_state(optimizer), make_batch()
    want = closed_form_gradient(state.params, batch)
    after, metrics = step(state, batch)
    np.testing.assert_allclose(after.params["w"], -0.1 * want["w"], rtol=1e-5)
    np.testing.assert_allclose(after.params["b"], 1 - 0.1 * want["b"], rtol=1e-5)
    norm = np.sqrt(sum((g**2).sum() for g in want.values()))
    assert float(metrics["grad_norm"][0]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["loss"][1]) == batch["weight"].sum()
    assert int(after.step) == 1


def test_padding_rows_do_not_change_the_update():
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(loss_fn=loss_fn, optimizer=optimizer))
    batch = make_batch()
    padded = {k: np.concatenate([v, np.full_like(v, 7.0)]) for k, v in batch.items()}
    padded["weight"][len(batch["weight"]) :] = 0
    a, _ = step(make_state(optimizer), batch)
    b, _ = step(make_state(optimizer), padded)
    np.testing.assert_allclose(a.params["w"], b.params["w"], rtol=1e-6)


def test_a_batch_of_padding_changes_nothing():
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(loss_fn=loss_fn, optimizer=optimizer))
    batch = make_batch()
    batch["weight"][:] = 0
    state = make_state(optimizer)
    after, _ = step(state, batch)
    np.testing.assert_array_equal(after.params["b"], state.params["b"])


def test_frozen_parameters_have_no_moments_and_do_not_move():
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    mask = trainable.match(["w"], {"w": 0, "b": 0})
    step = jax.jit(make_train_step(loss_fn=loss_fn, optimizer=optimizer, mask=mask))
    state = make_state(optimizer, mask=mask)
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} == {(), (3, 2)}
    after, metrics = step(state, make_batch())
    np.testing.assert_array_equal(after.params["b"], np.ones(2))
    assert not np.allclose(after.params["w"], 0)
    want = closed_form_gradient(state.params, make_batch())["w"]
    assert float(metrics["grad_norm"][0]) == pytest.approx(np.sqrt((want**2).sum()), rel=1e-5)


def test_ema_follows_the_parameters():
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(loss_fn=loss_fn, optimizer=optimizer, ema_decay=0.9))
    state = make_state(optimizer, ema=True)
    after, _ = step(state, make_batch())
    np.testing.assert_allclose(after.ema_params["w"], 0.1 * after.params["w"], rtol=1e-6)


def test_bfloat16_gradients_are_those_of_a_rounded_copy():
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_train_step(loss_fn=loss_fn, optimizer=optimizer, gradient_dtype="bfloat16"))
    state, batch = make_state(optimizer), make_batch()
    after, _ = step(state, batch)
    assert after.params["w"].dtype == jnp.float32
    want = -closed_form_gradient(state.params, batch)["w"]
    np.testing.assert_allclose(after.params["w"], want, rtol=1e-2)  # 8 bits of mantissa
    assert np.abs(np.asarray(after.params["w"]) - want).max() > 1e-6


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_step_leaves_the_state_bit_for_bit(poison):
    optimizer = optax.adamw(0.1)
    anomaly = Anomaly(action="skip")
    step = jax.jit(
        make_train_step(loss_fn=loss_fn, optimizer=optimizer, anomaly=anomaly, ema_decay=0.5)
    )
    state = make_state(optimizer, anomaly=anomaly, ema=True)
    state, _ = step(state, make_batch())
    bad = make_batch(seed=1)
    bad["x"][0, 0] = poison
    after, metrics = step(state, bad)
    assert float(metrics["anomaly"][0]) == 1.0
    for name in ("params", "opt_state", "ema_params", "variables"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(after, name))
    good, metrics = step(after, make_batch(seed=2))
    assert float(metrics["anomaly"][0]) == 0.0
    assert int(good.step) == 3


def test_a_spike_is_dropped_once_the_window_is_full():
    optimizer = optax.sgd(0.0)
    anomaly = Anomaly(action="skip", spike_sigmas=6.0, window=8)
    step = jax.jit(make_train_step(loss_fn=loss_fn, optimizer=optimizer, anomaly=anomaly))
    state = make_state(optimizer, anomaly=anomaly)
    verdicts = []
    for i in range(10):
        batch = make_batch(seed=i)
        if i == 9:
            batch["y"] = batch["y"] + 1e3
        state, metrics = step(state, batch)
        verdicts.append(float(metrics["anomaly"][0]))
    assert verdicts == [0.0] * 9 + [1.0]


def test_a_spike_before_the_window_is_full_is_not_judged():
    anomaly = Anomaly(spike_sigmas=1.0, window=8)
    statistics = anomaly.init()
    for loss in (1.0, 1.0, 1.0, 50.0):
        good, statistics = anomaly.judge(statistics, jnp.asarray(loss), jnp.asarray(1.0))
        assert bool(good)


def test_statistics_are_mean_and_variance():
    anomaly = Anomaly(window=100)
    statistics = anomaly.init()
    losses = np.random.default_rng(0).normal(3.0, 2.0, 50).astype(np.float32)
    for loss in losses:
        _, statistics = anomaly.judge(statistics, jnp.asarray(loss), jnp.asarray(1.0))
    assert float(statistics["mean"]) == pytest.approx(losses.mean(), rel=1e-4)
    assert float(statistics["variance"]) == pytest.approx(losses.var(), rel=1e-4)


def test_the_step_is_traced_once():
    traces = []

    def counting(params, batch, rng):
        traces.append(1)
        return loss_fn(params, batch, rng)

    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(loss_fn=counting, optimizer=optimizer), donate_argnums=0)
    state = make_state(optimizer)
    for seed in range(4):
        state, _ = step(state, make_batch(seed=seed))
    assert len(traces) == 1


def test_unknown_action_is_refused():
    with pytest.raises(ValueError, match="rollback"):
        Anomaly(action="explode")
