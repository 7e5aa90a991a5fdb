"""Rotary embedding against complex arithmetic in float64, and the properties it exists for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.rope import Rope


def complex_rotation(x_BTNH, positions_BT, base, layout):
    """x as complex pairs times exp(i * position * frequency), in float64."""
    x = np.asarray(x_BTNH, np.float64)
    head_dim = x.shape[-1]
    freq = base ** (-np.arange(0, head_dim, 2) / head_dim)
    turn = np.exp(1j * np.asarray(positions_BT, np.float64)[..., None, None] * freq)
    if layout == "half":
        z = (x[..., : head_dim // 2] + 1j * x[..., head_dim // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_matches_complex_rotation(layout, base):
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 10))
    positions = jax.random.randint(jax.random.key(1), (2, 7), 0, 500)
    got = Rope(base=base, layout=layout)(x, positions)
    want = complex_rotation(x, positions, base, layout)
    np.testing.assert_allclose(got, want, atol=2e-4)  # float32 angles up to 500 radians


def test_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    rope = Rope()

    def score(i, j):
        at = lambda p: jnp.full((1, 1), p)  # noqa: E731
        return float((rope(q, at(i)) * rope(k, at(j))).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_linear_scaling_stretches_positions():
    x = jax.random.normal(jax.random.key(0), (1, 4, 1, 8))
    positions = jnp.arange(4)[None]
    np.testing.assert_allclose(
        Rope(scaling="linear", factor=4.0)(x, 4 * positions), Rope()(x, positions), atol=1e-6
    )


def test_llama3_keeps_short_and_stretches_long_wavelengths():
    rope = Rope(base=5e5, scaling="llama3", factor=8.0)
    plain = Rope(base=5e5)
    ratio = np.asarray(plain.frequencies(128) / rope.frequencies(128))
    wavelength = 2 * np.pi / np.asarray(plain.frequencies(128))
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1.0)
    np.testing.assert_allclose(ratio[wavelength > 8192], 8.0, rtol=1e-6)
    assert np.all(np.diff(ratio) >= -1e-6)


def test_llama3_frequencies_are_those_of_transformers_to_the_last_bit():
    # transformers 5.24: positions in the thousands multiply a difference of one unit.
    rope = Rope(scaling="llama3", factor=8.0, original_length=64)
    expected = [1065353216, 1027962988, 994952723, 973239204, 950363860]
    assert rope.frequencies(10).view(np.int32).tolist() == expected


@pytest.mark.parametrize("bad", [{"layout": "other"}, {"scaling": "yarn"}])
def test_unknown_names_are_refused(bad):
    with pytest.raises(ValueError, match="use"):
        Rope(**bad)
