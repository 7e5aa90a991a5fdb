"""Norms against float64, in low precision, and with one gain per head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model import norm


@pytest.mark.parametrize("make", [norm.RMSNorm, norm.LayerNorm])
def test_matches_float64(make):
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 5, 16))
    scale = jax.random.normal(jax.random.key(1), (16,))
    got = make(eps=1e-5).apply({"params": {"scale": scale}}, x)
    z = np.asarray(x, np.float64)
    if make is norm.LayerNorm:
        z = z - z.mean(-1, keepdims=True)
    want = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_normalised_in_float32():
    x = (jnp.arange(64.0) + 1000).reshape(1, 64).astype(jnp.bfloat16)
    params = {"scale": jnp.ones(64)}
    got = norm.LayerNorm().apply({"params": params}, x)
    want = norm.LayerNorm().apply({"params": params}, x.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=1e-2)


def test_gain_per_head():
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 4))
    variables = norm.RMSNorm(scale_dims=2).init(jax.random.key(0), x)
    assert variables["params"]["scale"].value.shape == (3, 4)


def test_bias_shifts():
    x = jax.random.normal(jax.random.key(0), (2, 8))
    params = {"scale": jnp.ones(8), "bias": jnp.full(8, 2.0)}
    got = norm.LayerNorm(use_bias=True).apply({"params": params}, x)
    np.testing.assert_allclose(got.mean(-1), 2.0, rtol=1e-5)
