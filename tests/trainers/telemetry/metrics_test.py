"""Metrics: exact quotients, one step late."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.trainers.telemetry import metrics


def test_any_split_of_a_batch_gives_the_mean_over_tokens():
    rng = np.random.default_rng(0)
    nll, weight = rng.random(12), rng.integers(0, 2, 12).astype(float)
    total = None
    for part in np.split(np.arange(12), [3, 4, 9]):
        total = metrics.add(total, {"loss": ((nll * weight)[part].sum(), weight[part].sum())})
    expected = np.average(nll, weights=weight)
    assert metrics.divide(total)["loss"] == pytest.approx(expected, rel=1e-12)


def test_vectors_are_named_and_what_has_no_weight_is_left_out():
    pairs = {"source_loss": (np.array([6.0, 0.0, 1.0]), np.array([3.0, 0.0, 2.0])), "x": (1.0, 0.0)}
    names = {"source_loss": ["prose", "code", "web"]}
    assert metrics.divide(pairs, names) == {"source_loss/prose": 2.0, "source_loss/web": 0.5}
    assert set(metrics.divide(pairs)) == {"source_loss/0", "source_loss/2"}
    with pytest.raises(ValueError, match="zip"):
        metrics.divide(pairs, {"source_loss": ["prose"]})


def test_addition_keeps_names_of_either_side_and_runs_under_jit():
    added = jax.jit(metrics.add)(
        {"a": (jnp.ones(2), jnp.ones(2))}, {"a": (jnp.ones(2), jnp.ones(2)), "b": (1.0, 1.0)}
    )
    assert metrics.divide(added) == {"a/0": 1.0, "a/1": 1.0, "b": 1.0}


def test_late_fetch_is_one_step_behind_and_flushes_the_last():
    late = metrics.LateFetch()
    got = [late.push(step, {"loss": (jnp.float32(step), jnp.float32(1))}) for step in (1, 2, 3)]
    got.append(late.flush())
    assert got[0] is None
    assert [step for step, _ in got[1:]] == [1, 2, 3]
    assert [float(values["loss"][0]) for _, values in got[1:]] == [1.0, 2.0, 3.0]
    assert isinstance(got[1][1]["loss"][0], np.ndarray | np.generic)
    assert late.flush() is None


def test_late_fetch_does_not_wait_for_the_step_just_dispatched(monkeypatch):
    fetched = []
    monkeypatch.setattr(metrics.jax, "device_get", lambda x: fetched.append(x) or x)
    late = metrics.LateFetch()
    late.push(1, {"a": 1})
    assert fetched == []
    late.push(2, {"a": 2})
    assert fetched == [{"a": 1}]
