"""The choice of a token: restrictions against numpy and transformers, frequencies, greed.

goldens/make_generation.py says how transformers' numbers were made.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.trainers.decoding.sampling import Sampling, candidates, penalised, sample, seen_in

GOLDENS = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "generation.npz")


def allowed(logits, temperature, top_k, top_p, min_p=None):
    """Probabilities after all restrictions, in float64, one row at a time."""
    result = np.zeros(logits.shape)
    for row, out in zip(np.asarray(logits, np.float64), result, strict=True):
        order = np.argsort(-row, kind="stable")
        order = order[: top_k or len(row)]
        p = np.exp(row[order] / temperature)
        p /= p.sum()
        if top_p is not None:
            keep = 1
            while p[:keep].sum() < top_p:
                keep += 1
            order, p = order[:keep], p[:keep] / p[:keep].sum()
        if min_p is not None:
            kept = p >= min_p * p[0]
            order, p = order[kept], p[kept] / p[kept].sum()
        out[order] = p
    return result


def probabilities(logits, sampling):
    """[B, V] of what may be drawn."""
    kept, ids = candidates(jnp.asarray(logits), sampling)
    got = np.zeros(logits.shape)
    np.put_along_axis(got, np.asarray(ids), np.asarray(jax.nn.softmax(kept)), axis=1)
    return got


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 3, None, None),
        (0.7, None, 0.6, None),
        (1.3, 4, 0.8, None),
        (1.0, 100, 1.0, None),
        (1.0, None, 1e-6, None),
        (0.9, None, None, 0.3),
        (1.3, 5, 0.9, 0.2),
        (1.0, None, None, 1.0),
    ],
)
def test_restrictions_equal_a_numpy_reference(temperature, top_k, top_p, min_p):
    logits = 2 * np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    want = allowed(logits, temperature, top_k, top_p, min_p)
    np.testing.assert_allclose(probabilities(logits, sampling), want, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 0.7), ("top_k", 8), ("top_p", 0.8), ("min_p", 0.1)]
)
def test_each_restriction_equals_that_of_transformers(name, value):
    want = np.asarray(jax.nn.softmax(GOLDENS[f"alone/{name}"]))
    got = probabilities(GOLDENS["logits"], Sampling(**{name: value}))
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_repetition_penalty_equals_that_of_transformers_and_a_loop():
    logits, ids = GOLDENS["logits"], GOLDENS["ids"]
    seen = seen_in(jnp.asarray(ids), jnp.full(6, ids.shape[1]), logits.shape[1])
    got = penalised(jnp.asarray(logits), seen, 1.6)
    np.testing.assert_allclose(got, GOLDENS["alone/repetition_penalty"], rtol=1e-6)
    want = logits.astype(np.float64)
    for row, tokens in zip(want, ids, strict=True):
        for token in set(tokens.tolist()):
            row[token] = row[token] * 1.6 if row[token] < 0 else row[token] / 1.6
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # Padding is not seen, even where its id is.
    shorter = np.asarray(seen_in(jnp.asarray(ids), jnp.array([9, 1, 2, 3, 9, 9]), logits.shape[1]))
    assert [set(np.flatnonzero(row)) for row in shorter] == [
        set(row[:n].tolist()) for row, n in zip(ids, [9, 1, 2, 3, 9, 9], strict=True)
    ]


def test_all_restrictions_apply_in_the_order_of_transformers():
    logits, ids = jnp.asarray(GOLDENS["logits"]), jnp.asarray(GOLDENS["ids"])
    seen = seen_in(ids, jnp.full(6, ids.shape[1]), logits.shape[1])
    sampling = Sampling(temperature=0.7, top_k=8, top_p=0.8, min_p=0.1)
    got = probabilities(penalised(logits, seen, 1.6), sampling)
    want = np.asarray(jax.nn.softmax(GOLDENS["together"]))
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.8)])
def test_frequencies_are_within_four_sigma(top_k, top_p):
    draws = 4000
    logits = np.array([[0.5, -1.0, 1.0, 0.0, -3.0]], np.float32)
    sampling = Sampling(temperature=0.8, top_k=top_k, top_p=top_p)
    keys = jax.random.split(jax.random.key(3), draws)
    ids = sample(jnp.repeat(jnp.asarray(logits), draws, axis=0), keys, sampling)
    p = allowed(logits, 0.8, top_k, top_p)[0]
    counts = np.bincount(ids, minlength=5)
    assert np.all(np.abs(counts - draws * p) <= 4 * np.sqrt(draws * p * (1 - p)))


def test_temperature_zero_takes_the_first_of_the_most_probable():
    logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    for neutral in ({}, {"top_p": 1.0, "min_p": 0.0}):
        assert sample(logits, keys, Sampling(temperature=0.0, **neutral)).tolist() == [1, 0]


@pytest.mark.parametrize("setting", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_what_restricts_no_draw_is_refused(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name} = .* has no effect with temperature = 0"):
        Sampling(temperature=0.0, **setting)


def test_a_row_does_not_depend_on_its_neighbours():
    logits = jax.random.normal(jax.random.key(1), (4, 50))
    keys = jax.random.split(jax.random.key(2), 4)
    together = sample(logits, keys, Sampling(top_k=20)).tolist()
    for i in range(4):
        own = jnp.arange(4)[:, None] == i
        other = sample(jnp.where(own, logits, -logits), keys, Sampling(top_k=20))
        assert int(other[i]) == together[i]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)
