"""A mixture of MLPs against one that multiplies every token with every expert, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import moe
from model.config import TransformerConfig
from model.mlp import GatedMlp
from model.platform import use_platform, use_reference_forms

CONFIG = TransformerConfig(vocab_size=8, num_layers=1, embed_dim=6, num_heads=1, mlp_dim=5)


def dense_and_mask(params, x_BTD, top_k, renormalise):
    """All experts of all tokens, times weights that are zero where an expert is not chosen."""
    x = np.asarray(x_BTD, np.float64).reshape(-1, x_BTD.shape[-1])
    kernel = {name: np.asarray(value["kernel"], np.float64) for name, value in params.items()}
    logits = x @ kernel["router"]
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    threshold = np.sort(probs, axis=-1)[:, -top_k, None]
    weights = np.where(probs >= threshold, probs, 0.0)
    if renormalise:
        weights /= weights.sum(-1, keepdims=True)
    gate = np.einsum("md,edf->mef", x, kernel["gate"])
    hidden = gate / (1 + np.exp(-gate)) * np.einsum("md,edf->mef", x, kernel["up"])
    out = np.einsum("mef,efd->med", hidden, kernel["down"])
    return np.einsum("me,med->md", weights, out).reshape(x_BTD.shape)


def made(num_experts, top_k, renormalise=True, scale=1.0):
    mlp = moe.MoeMlp(config=CONFIG, num_experts=num_experts, top_k=top_k, renormalise=renormalise)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 17, 6))
    params = nn.unbox(mlp.init(jax.random.key(0), x_BTD)["params"])
    return mlp, jax.tree.map(lambda leaf: leaf * scale, params), x_BTD


# 'tpu' and 'gpu' stand for the accelerators' form, which runs on CPU too, slowly.
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "renormalise"),
    [(5, 2, True), (5, 2, False), (3, 3, True), (4, 1, False), (1, 1, True), (40, 2, True)],
)
def test_values_are_those_of_all_experts_masked(platform, num_experts, top_k, renormalise):
    mlp, params, x_BTD = made(num_experts, top_k, renormalise, scale=2.0)
    want = dense_and_mask(params, x_BTD, top_k, renormalise)
    with use_platform(platform):
        got = mlp.apply({"params": params}, x_BTD)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradients_are_those_of_all_experts_masked(platform):
    mlp, params, x_BTD = made(5, 2, scale=2.0)
    direction = np.asarray(jax.random.normal(jax.random.key(2), x_BTD.shape), np.float64)

    def loss(params):
        return jnp.sum(mlp.apply({"params": params}, x_BTD) * direction)

    with use_platform(platform):
        gradient = jax.grad(loss)(params)
    # Central differences of the reference, along one random direction for each array.
    for i, name in enumerate(sorted(params)):
        kernel = np.asarray(params[name]["kernel"], np.float64)
        step = 1e-6 * np.random.default_rng(i).normal(size=kernel.shape)
        up, down = (
            (dense_and_mask({**params, name: {"kernel": k}}, x_BTD, 2, True) * direction).sum()
            for k in (kernel + step, kernel - step)
        )
        along = (np.asarray(gradient[name]["kernel"], np.float64) * step).sum()
        assert along == pytest.approx((up - down) / 2, rel=1e-4), name


@pytest.mark.parametrize("sizes", [(7, 0, 0), (0, 0, 7), (3, 0, 4), (1, 5, 1), (0, 50, 7)])
def test_grouped_products_at_any_sizes(sizes):
    rows = sum(sizes)
    rows_RX = jax.random.normal(jax.random.key(0), (rows, 4))
    kernel_EXY = jax.random.normal(jax.random.key(1), (3, 4, 2))
    expert_R = np.repeat(np.arange(3), sizes)
    want = np.einsum("rx,rxy->ry", rows_RX, np.asarray(kernel_EXY)[expert_R])
    for platform in ("cpu", "tpu"):
        with use_platform(platform):
            got = moe.grouped_matmul(rows_RX, kernel_EXY, jnp.asarray(sizes))
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_equal_experts_are_one_mlp():
    """The limit in which routing cannot matter: with renormalised weights the mixture is the expert."""
    mlp, params, x_BTD = made(4, 2)
    one = {name: {"kernel": params[name]["kernel"][0]} for name in ("gate", "up", "down")}
    same = {
        name: {"kernel": jnp.broadcast_to(kernel["kernel"], (4, *kernel["kernel"].shape))}
        for name, kernel in one.items()
    }
    got = mlp.apply({"params": {**same, "router": params["router"]}}, x_BTD)
    want = GatedMlp(config=CONFIG).apply({"params": one}, x_BTD)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_reference_forms_have_forward_and_second_derivatives():
    mlp, params, x_BTD = made(3, 2)

    def value(x_BTD):
        return jnp.sum(mlp.apply({"params": params}, x_BTD) ** 2)

    with use_platform("tpu"), use_reference_forms():
        _, along = jax.jvp(jax.grad(value), (x_BTD,), (jnp.ones_like(x_BTD),))
    step = 1e-3
    with use_platform("cpu"):
        grads = [jax.grad(value)(x_BTD + sign * step) for sign in (1, -1)]
    np.testing.assert_allclose(along, (grads[0] - grads[1]) / (2 * step), atol=2e-2, rtol=2e-2)


def test_probabilities_are_sown():
    mlp, params, x_BTD = made(3, 2)
    _, sown = mlp.apply({"params": params}, x_BTD, mutable=["intermediates"])
    (probs_BTE,) = sown["intermediates"]["router_probs"]
    assert probs_BTE.shape == (2, 17, 3) and probs_BTE.dtype == jnp.float32
    np.testing.assert_allclose(probs_BTE.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(
        probs_BTE, jax.nn.softmax(x_BTD @ params["router"]["kernel"]), atol=1e-5
    )


def test_the_route_is_chosen_in_float32():
    """Experts that bfloat16 cannot tell apart are told apart."""
    probs_ME = jax.nn.softmax(jnp.asarray([[1.0, 1.0001, 0.0]]))
    routes = moe.route(probs_ME, top_k=1)
    assert routes.experts_MK.tolist() == [[1]]
    mlp, params, x_BTD = made(3, 1)
    half = moe.MoeMlp(
        config=TransformerConfig(
            vocab_size=8, num_layers=1, embed_dim=6, num_heads=1, mlp_dim=5, dtype="bfloat16"
        ),
        num_experts=3,
        top_k=1,
    )
    x_BTD = x_BTD.astype(jnp.bfloat16)
    out, sown = half.apply({"params": params}, x_BTD, mutable=["intermediates"])
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        sown["intermediates"]["router_probs"][0],
        jax.nn.softmax(x_BTD.astype(jnp.float32) @ params["router"]["kernel"]),
        atol=1e-5,
    )


@pytest.mark.parametrize("top_k", [0, 4])
def test_more_experts_per_token_than_there_are_is_refused(top_k):
    mlp = moe.MoeMlp(config=CONFIG, num_experts=3, top_k=top_k)
    with pytest.raises(ValueError, match=f"top_k = {top_k} must lie between 1 and num_experts = 3"):
        jax.eval_shape(mlp.init, jax.random.key(0), jnp.zeros((1, 2, 6)))


def test_experts_are_initialised_as_one_mlp_is():
    """The variance of a kernel is that of its own fan-in, whatever the number of experts."""
    mlp, params, _ = made(40, 2)
    assert float(params["up"]["kernel"].std()) == pytest.approx(6**-0.5, rel=0.1)
