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


# transformers 5.24: of 16 dimensions and base 500, rounded to whole pairs or not.
YARN = {
    (True, 32.0, 1.0): [
        *(1065353216, 1051760230, 1037601972, 1019685533),
        *(1010249151, 1000896877, 991621959, 982418189),
    ],
    (False, 8.0, 2.0): [
        *(1065353216, 1051149459, 1031492378, 1019685533),
        *(1010249151, 1000896877, 991621959, 982418189),
    ],
}


@pytest.mark.parametrize("bounds", YARN)
def test_yarn_frequencies_are_those_of_transformers_to_the_last_bit(bounds):
    names = ("truncate", "beta_fast", "beta_slow")
    rope = Rope(
        base=500.0,
        scaling="yarn",
        factor=4.0,
        original_length=64,
        **dict(zip(names, bounds, strict=True)),
    )
    assert rope.frequencies(16).view(np.int32).tolist() == YARN[bounds]


def test_yarn_stretches_pairs_by_how_often_they_turn_and_makes_scores_larger():
    """The ramp of the paper (arXiv 2309.00071, section 3.2), which is linear in the pair, and its equation 22."""
    rope = Rope(scaling="yarn", factor=8.0, original_length=4096)
    turns = 4096 * np.asarray(Rope().frequencies(128), np.float64) / (2 * np.pi)
    stretch = np.asarray(Rope().frequencies(128) / rope.frequencies(128), np.float64)
    np.testing.assert_allclose(stretch[turns > 40], 1.0)
    np.testing.assert_allclose(stretch[turns < 0.8], 8.0, rtol=1e-6)
    between = 1 / stretch[(turns > 1.3) & (turns < 25)]
    assert len(between) > 10
    np.testing.assert_allclose(np.diff(between, 2), 0, atol=1e-6)
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 8))
    longer = np.linalg.norm(rope(x, jnp.arange(3)[None])) / np.linalg.norm(x)
    assert longer == pytest.approx(0.1 * np.log(8.0) + 1, rel=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_a_fraction_of_a_head_is_rotated_as_a_head_of_its_size(layout):
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 24))
    positions = jax.random.randint(jax.random.key(1), (2, 7), 0, 50)
    got = Rope(layout=layout, fraction=0.25)(x, positions)
    np.testing.assert_allclose(
        got[..., :6], complex_rotation(x[..., :6], positions, 1e4, layout), atol=5e-5
    )
    np.testing.assert_array_equal(got[..., 6:], x[..., 6:])


def test_what_is_rotated_can_be_moved_on():
    """As StreamingLLM moves its first keys; scores are made larger once."""
    rope = Rope(fraction=0.5, scaling="yarn", factor=8.0, original_length=64)
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 16))
    at = jnp.arange(5)[None]
    np.testing.assert_allclose(rope.moved(rope(x, at), 3 * at), rope(x, 4 * at), atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"layout": "other"}, "use 'half'"),
        ({"scaling": "other"}, "must be one of"),
        ({"scaling": "yarn", "factor": 2.0, "beta_fast": 1.0}, "beta_fast must exceed"),
        ({"scaling": "yarn", "low_freq_factor": 2.0}, "no effect with scaling = 'yarn'"),
        ({"scaling": "linear", "attention_factor": 2.0}, "no effect with scaling = 'linear'"),
    ],
)
def test_unknown_names_and_settings_of_another_scaling_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        Rope(**bad)


def test_an_odd_number_of_rotated_dimensions_is_refused():
    with pytest.raises(ValueError, match="3 of head_dim = 12 dimensions"):
        Rope(fraction=0.25).frequencies(12)
