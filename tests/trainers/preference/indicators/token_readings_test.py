"""Entropy and mass of the likeliest tokens: closed forms, float64, and chunks of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.trainers.preference.indicators import reader
from espalier.trainers.preference.indicators.reader import read_tokens

top_k_entropy_and_mass = jax.jit(reader.top_k_entropy_and_mass, static_argnames="k")


@pytest.mark.parametrize("vocab", [10, 1000])
def test_uniform_logits_have_the_largest_entropy_and_a_mass_of_k_over_v(vocab):
    entropy_T, mass_T = top_k_entropy_and_mass(jnp.full((3, vocab), 7.5))
    np.testing.assert_allclose(entropy_T, np.log2(10), atol=1e-5)
    np.testing.assert_allclose(mass_T, 10 / vocab, rtol=1e-5)


def test_few_likely_tokens_have_the_entropy_of_their_number():
    logits_TV = np.full((3, 50), -np.inf, np.float32)
    logits_TV[0, 7] = 0.0
    logits_TV[1, [3, 30]] = 5.0
    logits_TV[2, [1, 2, 3, 4]] = -200.0
    entropy_T, mass_T = top_k_entropy_and_mass(jnp.asarray(logits_TV))
    np.testing.assert_allclose(entropy_T, [0, 1, 2], atol=1e-6)
    np.testing.assert_allclose(mass_T, 1, rtol=1e-6)


def test_entropy_is_of_the_k_alone_and_mass_is_not():
    """Half of the probability on two equal tokens, the rest spread over many."""
    probabilities_V = np.array([0.25, 0.25, *[0.005] * 100])
    logits_TV = jnp.log(jnp.asarray(probabilities_V, jnp.float32))[None]
    entropy_T, mass_T = top_k_entropy_and_mass(logits_TV, k=2)
    np.testing.assert_allclose(entropy_T, 1.0, rtol=1e-6)
    np.testing.assert_allclose(mass_T, 0.5, rtol=1e-6)


def test_a_vocabulary_smaller_than_k_is_taken_whole():
    entropy_T, mass_T = top_k_entropy_and_mass(jnp.zeros((1, 4)))
    np.testing.assert_allclose(entropy_T, 2.0, atol=1e-6)
    np.testing.assert_allclose(mass_T, 1.0, rtol=1e-6)


def by_sorting(h_TD, head_VD, targets_T, k, scale, softcap):
    logits_TV = scale * h_TD.astype(np.float64) @ head_VD.astype(np.float64).T
    if softcap is not None:
        logits_TV = softcap * np.tanh(logits_TV / softcap)
    p_TV = np.exp(logits_TV) / np.exp(logits_TV).sum(-1, keepdims=True)
    top_TK = np.sort(p_TV, -1)[:, -k:]
    q_TK = top_TK / top_TK.sum(-1, keepdims=True)
    log_p_T = np.log(np.take_along_axis(p_TV, targets_T[:, None], 1)[:, 0])
    return log_p_T, -(q_TK * np.log2(q_TK)).sum(-1), top_TK.sum(-1)


@pytest.mark.parametrize(
    ("chunk", "k", "scale", "softcap"),
    [(1, 10, 1.0, None), (4, 10, 1.0, None), (7, 3, 0.25, 2.0), (64, 3, 0.25, 2.0)],
)
def test_readings_are_those_of_whole_logits_in_float64(chunk, k, scale, softcap):
    rng = np.random.default_rng(0)
    h_TD = rng.normal(size=(13, 6)).astype(np.float32)
    head_VD = rng.normal(size=(40, 6)).astype(np.float32)
    targets_T = rng.integers(0, 40, 13)
    found = jax.jit(
        lambda h, w, t: read_tokens(h, w, t, k=k, logit_scale=scale, softcap=softcap, chunk=chunk)
    )(h_TD, head_VD, targets_T)
    want = by_sorting(h_TD, head_VD, targets_T, k, scale, softcap)
    for got, exact in zip((found.log_probs, found.entropies, found.masses), want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=2e-5, atol=2e-6)
    assert (found.entropies >= 0).all() and (found.entropies <= np.log2(k) + 1e-5).all()


def test_all_logits_are_never_in_memory():
    tokens, vocab, chunk = 256, 500, 8
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, 4), (vocab, 4))]
    ids = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    text = str(jax.make_jaxpr(lambda *x: read_tokens(*x, chunk=chunk))(*shapes, ids))
    assert f"f32[{chunk},{vocab}]" in text and f"f32[{tokens},{vocab}]" not in text


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="k = 0"):
        read_tokens(jnp.zeros((1, 2)), jnp.zeros((3, 2)), jnp.zeros(1, jnp.int32), k=0)
