"""The loss over blocks of the vocabulary equals the plain one, on one device and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.kernels.cross_entropy import token_log_probs, weighted_cross_entropy
from espalier.model.kernels.cross_entropy_blocked import blocked_nll, split
from espalier.model.kernels.vocab_logits import LogitForm, join_rows
from espalier.trainers import partitioning

T, D, V = 24, 16, 50


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    h_TD = rng.normal(size=(T, D)).astype("float32")
    head_VD = rng.normal(size=(V, D)).astype("float32")
    targets_T = rng.integers(0, V, T)
    targets_T[:2] = 0, V - 1
    return h_TD, head_VD, targets_T.astype("int32")


def float64_nll(h_TD, head_VD, targets_T, scale, softcap):
    logits_TV = scale * h_TD.astype("float64") @ head_VD.astype("float64").T
    if softcap is not None:
        logits_TV = softcap * np.tanh(logits_TV / softcap)
    high_T = logits_TV.max(-1)
    log_z_T = high_T + np.log(np.exp(logits_TV - high_T[:, None]).sum(-1))
    return log_z_T - logits_TV[np.arange(T), targets_T], log_z_T


@pytest.mark.parametrize("block", [1, 7, 25, V, 64])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 3.0)])
def test_values_against_float64(arrays, block, scale, softcap):
    found = blocked_nll(LogitForm(scale, softcap), *arrays, block)
    for got, expected in zip(found, float64_nll(*arrays, scale, softcap), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("block", [7, 25])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 3.0)])
def test_gradients_against_autodiff(arrays, block, scale, softcap):
    h_TD, head_VD, targets_T = arrays
    mix_T = np.linspace(-1, 2, T, dtype="float32")

    def loss(nll, h_TD, head_VD):
        nll_T, log_z_T = nll(h_TD, head_VD)
        return (mix_T * nll_T + mix_T[::-1] * log_z_T**2).sum()

    def plain(h_TD, head_VD):
        logits_TV = LogitForm(scale, softcap).logits(h_TD, head_VD)
        log_z_T = jax.nn.logsumexp(logits_TV, axis=-1)
        return log_z_T - logits_TV[jnp.arange(T), targets_T], log_z_T

    def blocked(h_TD, head_VD):
        return blocked_nll(LogitForm(scale, softcap), h_TD, head_VD, targets_T, block)

    found = jax.grad(functools.partial(loss, blocked), (0, 1))(h_TD, head_VD)
    expected = jax.grad(functools.partial(loss, plain), (0, 1))(h_TD, head_VD)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_blocks_are_strided_and_come_back():
    head_VD = np.arange(10.0)[:, None] * np.ones((1, 3))
    blocks_JCD = split(head_VD, 4)
    assert blocks_JCD.shape == (3, 4, 3)
    assert blocks_JCD[1, :, 0].tolist() == [1, 4, 7, 0]  # the last row is padding
    np.testing.assert_array_equal(join_rows(10, blocks_JCD), head_VD)


@pytest.mark.parametrize("rules", ["fsdp", "fsdp_tp"])
def test_through_the_loss_on_a_mesh(arrays, rules):
    h_TD, head_VD, targets_T = arrays
    head_VD = head_VD[:48]
    targets_T = targets_T % 48
    weights_T = np.linspace(0, 1, T, dtype="float32")

    def loss(implementation, h_TD, head_VD):
        return weighted_cross_entropy(
            h_TD, head_VD, targets_T, weights_T, z_loss=0.01, implementation=implementation
        )[0]

    expected = jax.value_and_grad(functools.partial(loss, "reference"), (0, 1))(h_TD, head_VD)
    mesh = partitioning.make_mesh(
        shape={"fsdp": 4, "tensor": 2 if rules == "fsdp_tp" else 1},
        devices=jax.devices()[: 8 if rules == "fsdp_tp" else 4],
    )
    with partitioning.use_mesh(mesh, partitioning.rules_named(rules)):
        found = jax.jit(jax.value_and_grad(functools.partial(loss, "blocked"), (0, 1)))(
            h_TD, head_VD
        )
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_token_log_probs(arrays):
    found = token_log_probs(*arrays, implementation="blocked")
    np.testing.assert_allclose(found, -float64_nll(*arrays, 1.0, None)[0], rtol=2e-6, atol=2e-6)
