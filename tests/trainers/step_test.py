"""The train step on a model small enough to check by hand: weighted least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.trainers import trainable
from espalier.trainers.anomaly import STATISTICS, Anomaly
from espalier.trainers.objectives.base import LossOut, Objective
from espalier.trainers.optim.averages import MovingAverage
from espalier.trainers.step import make_eval_step, make_train_step
from espalier.trainers.train_state import TrainState

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
    step = jax.jit(
        make_train_step(loss_fn=loss_fn, optimizer=optimizer, extensions=[MovingAverage(0.9)])
    )
    state = make_state(optimizer, ema=True)
    after, _ = step(state, make_batch())
    np.testing.assert_allclose(after.ema_params["w"], 0.1 * after.params["w"], rtol=1e-6)


def test_an_average_of_bfloat16_parameters_arrives():
    optimizer = optax.sgd(0.0)
    step = jax.jit(
        make_train_step(loss_fn=loss_fn, optimizer=optimizer, extensions=[MovingAverage(0.99)])
    )
    params = {"w": jnp.full((3, 2), 0.7, jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    begun = {"w": jnp.full((3, 2), 0.5, jnp.float32), "b": jnp.zeros(2, jnp.float32)}
    state = make_state(optimizer).replace(params=params, ema_params=begun)
    for _ in range(1000):
        state, _ = step(state, make_batch())
    np.testing.assert_allclose(state.ema_params["w"], params["w"].astype(np.float32), rtol=1e-4)


def test_norms_of_bfloat16_parameters_and_gradients_are_float32():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(300, 20)), "b": 0.01 * rng.normal(size=20)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)

    def linear(params, batch, rng):
        products = jax.tree.map(lambda p, c: (p * c).sum(dtype=jnp.float32), params, batch)
        total = sum(jax.tree.leaves(products))
        return LossOut(sum=total, weight=jnp.float32(1.0), metrics={})

    optimizer = optax.sgd(0.0)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    batch = jax.tree.map(lambda x: 3 * x, params)  # the gradient
    _, metrics = jax.jit(make_train_step(loss_fn=linear, optimizer=optimizer))(state, batch)
    for name, tree in (("param_norm", params), ("grad_norm", batch)):
        want = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))
        assert float(metrics[name][0]) == pytest.approx(want, rel=1e-5)


def test_the_average_of_what_does_not_move_is_itself():
    optimizer = optax.sgd(0.1)
    mask = trainable.match(["w"], {"w": 0, "b": 0})
    step = jax.jit(
        make_train_step(
            loss_fn=loss_fn, optimizer=optimizer, mask=mask, extensions=[MovingAverage(0.999)]
        )
    )
    state = make_state(optimizer, mask=mask)
    frozen = jax.random.normal(jax.random.key(0), (2,))
    params = {**state.params, "b": frozen}
    state = state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params))
    for seed in range(50):
        state, _ = step(state, make_batch(seed=seed))
    np.testing.assert_array_equal(state.ema_params["b"], frozen)


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
        make_train_step(
            loss_fn=loss_fn, optimizer=optimizer, extensions=[MovingAverage(0.5), anomaly]
        )
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
    step = jax.jit(make_train_step(loss_fn=loss_fn, optimizer=optimizer, extensions=[anomaly]))
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


def judged(anomaly, losses):
    """The verdicts on losses in turn, and the statistics after them."""
    statistics, verdicts = anomaly.init(), []
    for loss in losses:
        good, statistics = anomaly.judge(statistics, jnp.asarray(loss), jnp.asarray(1.0))
        verdicts.append(bool(good))
    return verdicts, statistics


@pytest.mark.parametrize("spikes", [(0,), (3,), (5,), (0, 2, 7)], ids=str)
def test_spikes_in_the_first_window_do_not_hide_later_ones(spikes):
    losses = np.random.default_rng(1).normal(5.8, 0.1, 24).astype(np.float32)
    anomaly = Anomaly(spike_sigmas=8.0, window=8)
    want = judged(anomaly, np.delete(losses, spikes)[: 8 - len(spikes)])[1]
    losses[list(spikes)] *= 50
    losses[[8, 17]] *= 50  # of those one is the first to be judged
    verdicts, statistics = judged(anomaly, losses)
    assert [i for i, good in enumerate(verdicts) if not good] == [8, 17]
    after = judged(anomaly, losses[:8])[1]
    for name in ("mean", "variance"):
        assert float(after[name]) == pytest.approx(float(want[name]), rel=1e-3)
    assert int(statistics["count"]) == 22


@pytest.mark.parametrize("losses", ["level", "falling"])
def test_a_first_window_without_spikes_has_its_plain_statistics(losses):
    noise = np.random.default_rng(2).normal(0, 0.1, 16).astype(np.float32)
    values = noise + (5.8 if losses == "level" else np.linspace(5.8, 3.0, 16, dtype=np.float32))
    statistics = judged(Anomaly(spike_sigmas=8.0, window=16), values)[1]
    plain = judged(Anomaly(window=16), values)[1]
    for name in ("mean", "variance", "count"):
        assert statistics[name] == plain[name]
    assert "gathered" not in plain


def test_unknown_losses_of_the_first_window_leave_the_plain_statistics():
    """A run that goes on from a checkpoint without them has NaN in their places."""
    anomaly = Anomaly(spike_sigmas=8.0, window=4)
    _, statistics = judged(anomaly, (5.0, 250.0))
    statistics["gathered"] = jnp.full(4, jnp.nan)
    for loss in (5.0, 5.0):
        good, statistics = anomaly.judge(statistics, jnp.asarray(loss), jnp.asarray(1.0))
        assert bool(good)
    assert float(statistics["mean"]) == pytest.approx(66.25)


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


# ---- Variables and extras of an objective.


def centred(params, batch, rng, *, variables, extras):
    """Least squares of inputs less their running mean, which training updates by halves."""
    running = variables["batch_stats"]["mean"]
    moved = {"mean": 0.5 * running + 0.5 * batch["x"].mean(0, keepdims=True)}
    out = loss_fn(params, {**batch, "x": batch["x"] - running}, rng)
    return out.replace(variables=None if rng is None else {"batch_stats": moved})


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_microbatch_reads_the_variables_the_one_before_wrote(microbatches):
    optimizer, batch = optax.sgd(0.1), make_batch()
    options = {"loss_fn": Objective(loss_fn=centred), "microbatches": microbatches}
    options["extensions"] = [Anomaly()]
    step = jax.jit(make_train_step(optimizer=optimizer, **options))
    begun = make_state(optimizer, anomaly=Anomaly())
    mean = np.full((1, 3), 0.25, np.float32)
    begun = begun.replace(variables={**begun.variables, "batch_stats": {"mean": mean}})
    after, metrics = step(begun, batch)
    loss = 0.0
    for index in range(microbatches):
        part = {name: value[index::microbatches] for name, value in batch.items()}
        loss += loss_fn(begun.params, {**part, "x": part["x"] - mean}, None).sum
        mean = 0.5 * mean + 0.5 * part["x"].mean(0, keepdims=True)
    assert float(metrics["loss"][0]) == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(after.variables["batch_stats"]["mean"], mean, rtol=1e-5)
    assert int(after.variables[STATISTICS]["count"]) == 1

    evaluate = jax.jit(make_eval_step(**options))
    found = evaluate(after.params, batch, after.variables)["loss"]
    want = loss_fn(after.params, {**batch, "x": batch["x"] - mean}, None)
    np.testing.assert_allclose(found, (want.sum, want.weight), rtol=1e-5)


def test_collections_that_the_state_does_not_hold_are_refused():
    def writes(params, batch, rng, **_):
        return loss_fn(params, batch, rng).replace(variables={"batch_stats": {"mean": 0.0}})

    optimizer = optax.sgd(0.1)
    step = make_train_step(loss_fn=Objective(loss_fn=writes), optimizer=optimizer)
    with pytest.raises(
        ValueError, match=r"writes the collections \['batch_stats'\], but the state"
    ):
        step(make_state(optimizer), make_batch())


@pytest.mark.parametrize(("rows", "parts"), [(8, 4), (6, 2), (5, 1)])
def test_evaluation_in_microbatches_is_that_of_the_whole(rows, parts):
    seen = []

    def watched(params, batch, rng):
        seen.append(batch["x"].shape[0])
        return loss_fn(params, batch, rng)

    params, batch = make_state(optax.sgd(0.1)).params, make_batch(rows)
    found = jax.jit(make_eval_step(loss_fn=watched, microbatches=4))(params, batch)
    assert set(seen) == {rows // parts}
    want = loss_fn(params, batch, None).metrics["loss"]
    np.testing.assert_allclose(found["loss"], want, rtol=1e-6)


def test_unknown_action_is_refused():
    with pytest.raises(ValueError, match="rollback"):
        Anomaly(action="explode")
