"""A mixture of MLPs against one that multiplies every token with every expert, in float64."""

import contextlib
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import LayerKind, TransformerConfig
from espalier.model.kernels.platform import use_platform, use_reference_forms
from espalier.model.mlp import GatedMlp
from espalier.model.moe import moe, routing
from espalier.model.nexus.domain_router import DomainRouter
from espalier.model.transformer import Block
from tests.drawn import drawn

TRAINING = {"dropout": jax.random.key(0)}  # limits of experts hold in training alone
CONFIG = TransformerConfig(vocab_size=8, num_layers=1, embed_dim=6, num_heads=1, mlp_dim=5)


def dense_and_mask(params, x_BTD, top_k, renormalise, score="softmax"):
    """All experts of all tokens, times weights that are zero where an expert is not chosen."""
    x = np.asarray(x_BTD, np.float64).reshape(-1, x_BTD.shape[-1])
    dense = {name: value for name, value in params.items() if name != "choice_bias"}
    kernel = {name: np.asarray(value["kernel"], np.float64) for name, value in dense.items()}
    logits = x @ kernel["router"]
    scores = 1 / (1 + np.exp(-logits))
    if score == "softmax":
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    order = scores + np.asarray(params.get("choice_bias", 0.0), np.float64)
    threshold = np.sort(order, axis=-1)[:, -top_k, None]
    weights = np.where(order >= threshold, scores, 0.0)
    if renormalise:
        weights /= weights.sum(-1, keepdims=True)
    gate = np.einsum("md,edf->mef", x, kernel["gate"])
    hidden = gate / (1 + np.exp(-gate)) * np.einsum("md,edf->mef", x, kernel["up"])
    out = np.einsum("mef,efd->med", hidden, kernel["down"])
    return np.einsum("me,med->md", weights, out).reshape(x_BTD.shape)


def made(num_experts, top_k, renormalise=True, scale=1.0, **settings):
    mlp = moe.MoeMlp(
        config=CONFIG, num_experts=num_experts, top_k=top_k, renormalise=renormalise, **settings
    )
    x_BTD = jax.random.normal(jax.random.key(1), (2, 17, 6))
    params = nn.unbox(drawn(mlp, x_BTD))
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
        got = jax.jit(mlp.apply)({"params": params}, x_BTD)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("form", [contextlib.nullcontext, use_reference_forms])
def test_gradients_are_those_of_all_experts_masked(form):
    mlp, params, x_BTD = made(5, 2, scale=2.0)
    direction = np.asarray(jax.random.normal(jax.random.key(2), x_BTD.shape), np.float64)

    def loss(params):
        return jnp.sum(mlp.apply({"params": params}, x_BTD) * direction)

    with form():
        gradient = jax.jit(jax.grad(loss))(params)
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


@pytest.mark.parametrize(("top_k", "renormalise"), [(2, True), (2, False), (1, True), (5, False)])
def test_sigmoids_weigh_the_chosen_experts(top_k, renormalise):
    """DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16) without its shared expert; Cohere2-MoE's 'sigmoid'."""
    mlp, params, x_BTD = made(5, top_k, renormalise, scale=2.0, score="sigmoid")
    want = dense_and_mask(params, x_BTD, top_k, renormalise, "sigmoid")
    got = jax.jit(mlp.apply)({"params": params}, x_BTD)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    scaled = jax.jit(mlp.clone(routed_scale=2.5).apply)({"params": params}, x_BTD)
    np.testing.assert_allclose(scaled, 2.5 * want, atol=5e-5, rtol=2e-5)
    # Of one expert with weight 1 the loss says nothing; float32 rounds 1 - 1.
    gradient = jax.jit(jax.grad(lambda params: mlp.apply({"params": params}, x_BTD).std()))(params)
    learns = float(jnp.abs(gradient["router"]["kernel"]).max()) > 1e-5
    assert learns == (not renormalise or top_k > 1)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_biases_enter_the_choice_and_not_the_weight(score):
    mlp, params, x_BTD = made(5, 2, scale=2.0, score=score, balance_bias=True)
    unbiased = dense_and_mask(params, x_BTD, 2, True, score)
    np.testing.assert_allclose(jax.jit(mlp.apply)({"params": params}, x_BTD), unbiased, atol=2e-5)
    params["choice_bias"] = jnp.array([0.3, -0.2, 0.0, 0.25, -0.1])
    apply = jax.jit(functools.partial(mlp.apply, mutable=["counts", "intermediates"]))
    got, sown = apply({"params": params}, x_BTD)
    want = dense_and_mask(params, x_BTD, 2, True, score)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    assert np.abs(want - unbiased).max() > 1e-2
    experts = np.asarray(sown["intermediates"]["router_experts"][0])
    np.testing.assert_array_equal(
        sown["counts"]["choice_bias"], np.bincount(experts.ravel(), minlength=5)
    )
    gradient = jax.jit(jax.grad(lambda params: mlp.apply({"params": params}, x_BTD).std()))(params)
    np.testing.assert_array_equal(gradient["choice_bias"], 0.0)


def test_a_sigmoid_router_sows_shares_and_balances_them():
    """The loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20), in float64, over the batch."""
    mlp, params, x_BTD = made(5, 2, scale=2.0, score="sigmoid", balance_loss=0.1)
    apply = jax.jit(functools.partial(mlp.apply, mutable=["losses", "metrics", "intermediates"]))
    _, sown = apply({"params": params}, x_BTD)
    logits = np.asarray(x_BTD, np.float64) @ np.asarray(params["router"]["kernel"], np.float64)
    scores = (1 / (1 + np.exp(-logits))).reshape(-1, 5)
    shares = scores / scores.sum(-1, keepdims=True)
    (probs,) = sown["intermediates"]["router_probs"]
    np.testing.assert_allclose(probs.reshape(-1, 5), shares, rtol=1e-4)
    chosen = np.argsort(-logits.reshape(-1, 5), axis=-1)[:, :2]
    f_E = 5 / (2 * len(scores)) * np.bincount(chosen.ravel(), minlength=5)
    assert float(sown["losses"]["balance"][0]) == pytest.approx(
        0.1 * (f_E * shares.mean(0)).sum(), rel=1e-4
    )
    entropy = -(shares * np.log(shares)).sum(-1).mean()
    assert float(sown["metrics"]["router_entropy"][0]) == pytest.approx(entropy, rel=1e-4)
    top = float(sown["metrics"]["router_top_probability"][0])
    assert top == pytest.approx(shares.max(-1).mean(), rel=1e-4)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("combine", ["sum", "average"])
def test_shared_experts_are_one_mlp_of_their_widths(count, combine):
    settings = {"shared": GatedMlp, "shared_experts": count, "combine_shared": combine}
    mlp, params, x_BTD = made(4, 2, expert_dim=3, **settings)
    assert params["up"]["kernel"].shape == (4, 6, 3)
    assert params["shared"]["up"]["kernel"].shape == (6, 3 * count)
    routed = {name: value for name, value in params.items() if name != "shared"}
    want = dense_and_mask(routed, x_BTD, 2, True)
    up, gate, down = (
        np.asarray(params["shared"][x]["kernel"], np.float64) for x in ("up", "gate", "down")
    )
    inner = np.asarray(x_BTD, np.float64) @ gate
    want = want + (inner / (1 + np.exp(-inner)) * (x_BTD @ up)) @ down
    want = want / 2 if combine == "average" else want
    np.testing.assert_allclose(
        jax.jit(mlp.apply)({"params": params}, x_BTD), want, atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"score": "sigmod"}, "MoeMlp.score is 'sigmod'; it must be one of 'softmax', 'sigmoid'"),
        (
            {"score": "sigmoid", "router_z_loss": 0.1},
            "router_z_loss = 0.1 has no effect with score",
        ),
        ({"shared_experts": 2}, "shared_experts = 2 has no effect with shared = None"),
        ({"combine_shared": "average"}, "'average' has no effect with shared = None"),
        ({"shared": GatedMlp, "combine_shared": "mean"}, "it must be one of 'sum', 'average'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(settings, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        jax.eval_shape(
            moe.MoeMlp(config=CONFIG, **settings).init, jax.random.key(0), jnp.zeros((1, 2, 6))
        )


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


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equal_experts_are_one_mlp(score):
    """The limit in which routing cannot matter: with renormalised weights the mixture is the expert."""
    mlp, params, x_BTD = made(4, 2, score=score)
    one = {name: {"kernel": params[name]["kernel"][0]} for name in ("gate", "up", "down")}
    same = {
        name: {"kernel": jnp.broadcast_to(kernel["kernel"], (4, *kernel["kernel"].shape))}
        for name, kernel in one.items()
    }
    got = jax.jit(mlp.apply)({"params": {**same, "router": params["router"]}}, x_BTD)
    want = jax.jit(GatedMlp(config=CONFIG).apply)({"params": one}, x_BTD)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_reference_forms_have_forward_and_second_derivatives():
    mlp, params, x_BTD = made(3, 2)

    def value(x_BTD):
        return jnp.sum(mlp.apply({"params": params}, x_BTD) ** 2)

    with use_platform("tpu"), use_reference_forms():
        along = jax.jit(lambda x: jax.jvp(jax.grad(value), (x,), (jnp.ones_like(x),))[1])(x_BTD)
    step = 1e-3
    with use_platform("cpu"):
        gradient = jax.jit(jax.grad(value))
        grads = [gradient(x_BTD + sign * step) for sign in (1, -1)]
    np.testing.assert_allclose(along, (grads[0] - grads[1]) / (2 * step), atol=2e-2, rtol=2e-2)


def test_probabilities_are_sown():
    mlp, params, x_BTD = made(3, 2)
    apply = jax.jit(functools.partial(mlp.apply, mutable=["intermediates"]))
    _, sown = apply({"params": params}, x_BTD)
    (probs_BTE,) = sown["intermediates"]["router_probs"]
    assert probs_BTE.shape == (2, 17, 3) and probs_BTE.dtype == jnp.float32
    np.testing.assert_allclose(probs_BTE.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(
        probs_BTE, jax.nn.softmax(x_BTD @ params["router"]["kernel"]), atol=1e-5
    )


def test_the_router_alone_multiplies_in_float32_where_the_default_rounds_to_bfloat16():
    mlp, x_BTD = moe.MoeMlp(config=CONFIG, num_experts=3, top_k=1), jnp.zeros((2, 4, 6))
    params = jax.eval_shape(mlp.init, jax.random.key(0), x_BTD)
    with jax.default_matmul_precision("default"):
        program = str(jax.make_jaxpr(mlp.apply)(params, x_BTD))
    found = re.findall(
        r":f32\[([\d,]+)\] = dot_general\[.*?precision=\(Precision.(\w+)", program, re.S
    )
    assert dict(found)["2,4,3"] == "HIGHEST"
    assert {precision for shape, precision in found if shape != "2,4,3"} == {"DEFAULT"}


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
    apply = jax.jit(functools.partial(half.apply, mutable=["intermediates"]))
    out, sown = apply({"params": params}, x_BTD)
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


# ---- Padding, capacity, the shared expert, blocks.


def kept_in_line(experts, capacity, num_experts):
    """Which choices are among their expert's first `capacity` of their row, by a loop."""
    kept = np.zeros(experts.shape, bool)
    for row, flags in zip(experts, kept, strict=True):
        taken = np.zeros(num_experts, int)
        for t, k in np.ndindex(row.shape):
            flags[t, k] = taken[row[t, k]] < capacity
            taken[row[t, k]] += 1
    return kept


def masked(params, x_BTD, weights_BTE):
    """All experts of all tokens times given weights; differentiable."""
    kernel = {name: value["kernel"] for name, value in params.items()}
    gate = jnp.einsum("btd,edf->btef", x_BTD, kernel["gate"])
    hidden = jax.nn.silu(gate) * jnp.einsum("btd,edf->btef", x_BTD, kernel["up"])
    return jnp.einsum("btef,efd,bte->btd", hidden, kernel["down"], weights_BTE)


def same(a, b):
    # Both sides are sums of some hundred float32 terms in different orders.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("form", "factor"),
    [
        *((contextlib.nullcontext, factor) for factor in (0.1, 1.0)),
        *((use_reference_forms, factor) for factor in (0.5, 5.0)),
    ],
)
def test_beyond_its_capacity_an_expert_adds_nothing(form, factor):
    """Against all experts of all tokens with masked weights, values and gradients."""
    full, params, x_BTD = made(5, 2, scale=2.0)
    mlp = full.clone(capacity_factor=factor)
    capacity = math.ceil(factor * 17 * 2 / 5)

    def weights(params):
        routes = moe.route(jax.nn.softmax(x_BTD @ params["router"]["kernel"]), top_k=2)
        kept = kept_in_line(np.asarray(routes.experts_MK), capacity, 5)
        one_hot = jax.nn.one_hot(routes.experts_MK, 5) * kept[..., None]
        return (one_hot * routes.weights_MK[..., None]).sum(-2), kept

    def reference(params, weights_BTE):
        return jnp.sum(jnp.sin(masked(params, x_BTD, weights_BTE)))

    def got(params):
        out, sown = mlp.apply({"params": params}, x_BTD, mutable=["metrics"], rngs=TRAINING)
        return jnp.sum(jnp.sin(out)), (out, sown)

    weights_BTE, pull, kept = jax.vjp(weights, params, has_aux=True)
    want, cotangent = jax.jit(jax.grad(reference, argnums=(0, 1)))(params, weights_BTE)
    want["router"] = pull(cotangent)[0]["router"]
    with form():
        gradient, (out, sown) = jax.jit(jax.grad(got, has_aux=True))(params)
    np.testing.assert_allclose(out, masked(params, x_BTD, weights_BTE), atol=1e-5)
    jax.tree.map(same, gradient, want)
    (dropped,) = sown["metrics"]["router_dropped"]
    assert float(dropped) == pytest.approx(1 - kept.mean(), abs=1e-6)
    assert (factor == 5.0) == kept.all()


@pytest.mark.parametrize("factor", [None, 1.0, 0.6])
def test_padding_takes_no_expert_and_counts_nowhere(factor):
    full, params, x_BTD = made(5, 2, scale=2.0)
    mlp = full.clone(balance_loss=0.1, router_z_loss=0.01, capacity_factor=factor)
    real_BT = jnp.broadcast_to(jnp.arange(17) < 11, (2, 17))
    watched = ["losses", "metrics"]

    @jax.jit
    def run(x_BTD, segments_BT=None):
        return mlp.apply(
            {"params": params}, x_BTD, segments_BT=segments_BT, mutable=watched, rngs=TRAINING
        )

    out, sown = run(x_BTD, jnp.where(real_BT, 3, 0))
    other = jnp.where(real_BT[..., None], x_BTD, 100.0)
    again, sown_again = run(other, jnp.where(real_BT, 3, 0))
    np.testing.assert_array_equal(out, again)
    jax.tree.map(np.testing.assert_array_equal, sown, sown_again)
    np.testing.assert_array_equal(out[:, 11:], 0.0)
    short, sown_short = run(x_BTD[:, :11])
    np.testing.assert_allclose(out[:, :11], short, atol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, sown, sown_short)


def test_outside_of_training_no_choice_is_dropped():
    """So a token has the same experts alone, in a padded row, behind another document and when it is decoded."""
    full, params, x_BTD = made(5, 2, scale=2.0)
    limited = full.clone(capacity_factor=0.1, exchange_factor=0.1)
    got, sown = limited.apply({"params": params}, x_BTD, mutable=["metrics"])
    np.testing.assert_array_equal(got, full.apply({"params": params}, x_BTD))
    assert float(sown["metrics"]["router_dropped"][0]) == 0.0
    trained = limited.apply({"params": params}, x_BTD, rngs=TRAINING)
    assert np.abs(trained - got).max() > 1e-2


def test_capacity_looks_neither_ahead_nor_at_other_rows():
    full, params, x_BTD = made(5, 2, scale=2.0)
    mlp = full.clone(capacity_factor=0.6)
    apply = jax.jit(functools.partial(mlp.apply, rngs=TRAINING))
    out = apply({"params": params}, x_BTD)
    changed = x_BTD.at[0, 9:].set(-x_BTD[0, 9:])
    again = apply({"params": params}, changed)
    np.testing.assert_array_equal(out[0, :9], again[0, :9])
    np.testing.assert_array_equal(out[1], again[1])
    assert np.abs(out[0, 9:] - again[0, 9:]).max() > 1e-2


def test_losses_are_sown_with_their_weights():
    full, params, x_BTD = made(5, 2)
    shapes = jax.eval_shape(lambda: full.apply({"params": params}, x_BTD, mutable=["losses"]))
    assert "losses" not in shapes[1]
    mlp = full.clone(balance_loss=0.1, router_z_loss=0.01)
    _, sown = jax.jit(functools.partial(mlp.apply, mutable=["losses"]))({"params": params}, x_BTD)
    logits = x_BTD @ params["router"]["kernel"]
    probs, real = jax.nn.softmax(logits), jnp.ones((2, 17), bool)
    balance = routing.balance_loss(probs, moe.route(probs, top_k=2).experts_MK, real)
    (got,), (z_loss,) = sown["losses"]["balance"], sown["losses"]["router_z"]
    assert float(got) == pytest.approx(0.1 * float(balance), rel=1e-5)
    assert float(z_loss) == pytest.approx(0.01 * float(routing.z_loss(logits, real)), rel=1e-5)


def test_soft_routing_is_the_mean_of_all_experts():
    mlp, params, x_BTD = made(4, 4, renormalise=False, scale=2.0)
    weights = jax.nn.softmax(x_BTD @ params["router"]["kernel"])
    got = jax.jit(mlp.apply)({"params": params}, x_BTD)
    np.testing.assert_allclose(got, masked(params, x_BTD, weights), atol=1e-5)


def test_copies_of_one_mlp_behind_raw_top_1_are_it_times_the_largest_probability():
    mlp, params, x_BTD = made(4, 1, renormalise=False, scale=2.0)
    one = {name: {"kernel": params[name]["kernel"][0]} for name in ("gate", "up", "down")}
    copies = jax.tree.map(lambda kernel: jnp.broadcast_to(kernel, (4, *kernel.shape)), one)
    probs = jax.nn.softmax(x_BTD @ params["router"]["kernel"])
    expert = jax.jit(GatedMlp(config=CONFIG).apply)
    want = probs.max(-1, keepdims=True) * expert({"params": one}, x_BTD)
    got = jax.jit(mlp.apply)({"params": {**copies, "router": params["router"]}}, x_BTD)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_copies_of_the_shared_expert_multiply_it_by_one_plus_the_gate():
    """Nexus (arXiv 2408.15901): y = shared(x) + s FFN(x), with s not renormalised."""
    full, params, x_BTD = made(4, 1, renormalise=False, scale=2.0)
    mlp = full.clone(shared=GatedMlp)
    one = {name: {"kernel": params[name]["kernel"][0]} for name in ("gate", "up", "down")}
    same = {
        name: {"kernel": jnp.broadcast_to(kernel["kernel"], params[name]["kernel"].shape)}
        for name, kernel in one.items()
    }
    params = {**same, "router": params["router"], "shared": one}
    shapes = jax.eval_shape(mlp.init, jax.random.key(0), x_BTD)["params"]
    assert jax.tree.map(jnp.shape, nn.unbox(shapes)) == jax.tree.map(jnp.shape, params)
    gate = jax.nn.softmax(x_BTD @ params["router"]["kernel"]).max(-1, keepdims=True)
    want = (1 + gate) * jax.jit(GatedMlp(config=CONFIG).apply)({"params": one}, x_BTD)
    got = jax.jit(mlp.apply)({"params": params}, x_BTD)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_average_of_a_shared_and_renormalised_copies_of_it_is_the_mlp():
    """So a mixture with RENORMALISE that is upcycled from copies of its seed begins as the seed."""
    mlp, params, x_BTD = made(4, 2, shared=GatedMlp, combine_shared="average")
    shared = params["shared"]
    copies = jax.tree.map(lambda kernel: jnp.broadcast_to(kernel, (4, *kernel.shape)), shared)
    got = jax.jit(mlp.apply)({"params": {**params, **copies}}, x_BTD)
    want = jax.jit(GatedMlp(config=CONFIG).apply)({"params": shared}, x_BTD)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_experts_in_parts():
    """Numbers and widths, with a shared expert that keeps its own; and what cannot be split."""

    def finer(parts, **settings):
        mixture = functools.partial(moe.MoeMlp, num_experts=3, top_k=2, **settings)
        return moe.experts_of(moe=mixture, granularity=parts)(config=CONFIG, kind=LayerKind())

    shapes = jax.eval_shape(
        finer(5, shared=GatedMlp).init, jax.random.key(0), jnp.zeros((1, 2, 6))
    )["params"]
    shapes = jax.tree.map(jnp.shape, nn.unbox(shapes))
    assert shapes["up"]["kernel"] == (15, 6, 1) and shapes["router"]["kernel"] == (6, 15)
    assert shapes["shared"]["up"]["kernel"] == (6, 5)
    assert finer(5).settings.top_k == 10 and finer(1).settings.top_k == 2
    with pytest.raises(ValueError, match="granularity = 2 does not divide the experts' width, 5"):
        finer(2)
    with pytest.raises(ValueError, match="this router knows an expert by its data"):
        finer(5, router=DomainRouter)


@pytest.mark.parametrize("layout", ["parallel", "sequential"])
def test_a_block_of_equal_experts_is_the_dense_block(layout):
    """Both layouts, with the segments of packed rows and padding: real tokens get the same."""
    mixture = Block(
        config=CONFIG, layout=layout, mlp=functools.partial(moe.MoeMlp, num_experts=3, top_k=2)
    )
    dense = Block(config=CONFIG, layout=layout)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 6, 6))
    context = {
        "positions_BT": jnp.broadcast_to(jnp.arange(6), (2, 6)),
        "segments_BT": jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]]),
    }
    params = nn.unbox(jax.jit(dense.init)(jax.random.key(0), x_BTD, **context)["params"])
    copies = jax.tree.map(lambda k: jnp.broadcast_to(k, (3, *k.shape)), params["mlp"])
    router = {"kernel": jax.random.normal(jax.random.key(2), (6, 3))}
    mixed = {**params, "mlp": {**copies, "router": router}}
    want, _ = jax.jit(dense.apply)({"params": params}, x_BTD, **context)
    got, _ = jax.jit(mixture.apply)({"params": mixed}, x_BTD, **context)
    real = context["segments_BT"] != 0
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)


@pytest.mark.parametrize("name", ["capacity_factor", "exchange_factor"])
def test_a_factor_that_is_not_positive_is_refused(name):
    mlp = moe.MoeMlp(config=CONFIG, **{name: 0.0})
    with pytest.raises(ValueError, match=f"MoeMlp.{name} = 0.0 must be positive; None keeps"):
        jax.eval_shape(mlp.init, jax.random.key(0), jnp.zeros((1, 2, 6)))
