"""Mixtures of adapters at one site: the invariants of MoV and MoLORA (arXiv 2309.05444).

Shapes: B rows, T tokens, X in, Y out, N experts, R rank, H heads of K.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model import axes
from espalier.model.adapters import adapter
from espalier.model.adapters.adapter import AdapterError
from espalier.model.adapters.ia3 import Ia3
from espalier.model.adapters.lora import Lora
from espalier.model.config import TransformerConfig
from espalier.model.linear import Dense
from espalier.model.mlp import GatedMlp
from espalier.model.mov.molora import MoLora
from espalier.model.mov.mov import Mov
from espalier.model.mov.sentence import sentence_embeddings

KEY = jax.random.key(0)
B, T, X, Y, N, R, H = 2, 3, 6, 8, 4, 2, 2
OUT = {"outputs": (".*",), "inputs": ()}
IN = {"outputs": (), "inputs": (".*",)}
ALL = {"layers": (".*",)}


def x_btx():
    return jnp.asarray(np.random.default_rng(1).normal(size=(B, T, X)), jnp.float32)


class Site(nn.Module):
    """A projection with one adapter, as attention calls it; `__call__` returns the output."""

    make: object
    heads: int = 1

    @nn.compact
    def __call__(self, x, layer_input=None):
        base = Dense(features=Y, axes=(axes.EMBED, axes.KV_HEADS), name="key")
        read = x if layer_input is None else layer_input
        return adapter.named(one=self.make)(base, heads=self.heads, layer_input=read)(x)


def site(kind, *, heads=1, random=True, **settings):
    """(module, parameters with random or first values)"""
    module = Site(functools.partial(kind, **settings), heads)
    params = nn.meta.unbox(module.init(KEY, x_btx()))["params"]["key"]
    if random:
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.3, 0.7, x.shape), x.dtype), params)
    return module, params


def apply(module, params, *inputs, **settings):
    return module.apply({"params": {"key": params}}, *(inputs or (x_btx(),)), **settings)


def probabilities(module, params):
    _, written = apply(module, params, mutable=["intermediates"])
    return written["intermediates"]["key"]["adapter_one"]["router_probs"][0]


def numpy(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def top(probs, k, renormalise):
    keep = probs >= np.sort(probs, -1)[..., -k, None]
    chosen = probs * keep
    return chosen / chosen.sum(-1, keepdims=True) if renormalise else chosen


CHOICES = [(None, True), (2, True), (2, False), (1, False)]


@pytest.mark.parametrize(("top_k", "renormalise"), CHOICES)
@pytest.mark.parametrize("read", ["site_tensor", "layer_input"])
@pytest.mark.parametrize("kind", ["heads", "input"])
def test_mov_averages_vectors_and_rescales_once(kind, read, top_k, renormalise):
    """Each head is routed by itself; as many experts as there are, in any form, are the soft mixture (8)."""
    heads, where = (H, OUT) if kind == "heads" else (1, IN)
    settings = {"num_experts": N, "router_input": read, "top_k": top_k, "renormalise": renormalise}
    module, params = site(Mov, heads=heads, **where, **settings)
    w, x = numpy(params), numpy(x_btx())
    one, y = w["adapter_one"], x @ w["kernel"]
    tensor = y.reshape(B, T, H, Y // H) if kind == "heads" else x
    if kind == "heads" and read == "layer_input":
        tensor = x[:, :, None]
    probs = softmax(tensor @ one["router"]["kernel"])
    probs = probs if top_k is None else top(probs, top_k, renormalise)
    if kind == "heads":
        scales = one["output_scales"].reshape(N, H, -1)
        probs = np.broadcast_to(probs, (B, T, H, N))
        expected = y * np.einsum("bthn,nhk->bthk", probs, scales).reshape(B, T, Y)
    else:
        expected = (x * (probs @ one["input_scales"])) @ w["kernel"]
    np.testing.assert_allclose(apply(module, params), expected, atol=1e-5)
    if top_k is None:
        all_of_them = site(Mov, heads=heads, **where, **{**settings, "top_k": N})[0]
        np.testing.assert_allclose(apply(all_of_them, params), expected, atol=1e-5)


@pytest.mark.parametrize(("top_k", "renormalise"), CHOICES)
def test_molora_in_rank_space_averages_the_matrices_and_not_the_factors(top_k, renormalise):
    """(3), (4) and (8)"""
    settings = {
        "num_experts": N,
        "top_k": top_k,
        "renormalise": renormalise,
        "rank": R,
        "alpha": 4.0,
    }
    module, params = site(MoLora, **ALL, **settings)
    w, x = numpy(params), numpy(x_btx())
    one = w["adapter_one"]
    probs = softmax(x @ one["router"]["kernel"])
    probs = probs if top_k is None else top(probs, top_k, renormalise)
    a, b = one["lora_a"], one["lora_b"]
    change = np.einsum("btn,nxr,nry->btxy", probs, a, b)
    expected = x @ w["kernel"] + 2 * np.einsum("btx,btxy->bty", x, change)
    got = np.asarray(apply(module, params))
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    apart = np.einsum("btn,nxr->btxr", probs, a), np.einsum("btn,nry->btry", probs, b)
    wrong = x @ w["kernel"] + 2 * np.einsum("btx,btxr,btry->bty", x, *apart)
    if top_k != 1:
        assert np.linalg.norm(wrong - expected) > 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("kind", "plain", "where"),
    [(Mov, Ia3, OUT), (Mov, Ia3, IN), (MoLora, Lora, {**ALL, "rank": R})],
)
def test_one_expert_is_the_plain_adapter_without_a_router(kind, plain, where):
    """(1) and (12)"""
    module, params = site(kind, num_experts=1, **where)
    other, same = site(plain, **where)
    assert jax.tree.structure(params) == jax.tree.structure(same) and "router" not in params
    np.testing.assert_array_equal(apply(module, params), apply(other, params))


@pytest.mark.parametrize(
    ("kind", "settings"), [(Mov, OUT), (Mov, IN), (MoLora, {**ALL, "rank": R})]
)
def test_the_first_step(kind, settings):
    """(2) and (6): the start is the base model, and the router has no gradient yet."""
    module, params = site(kind, num_experts=N, random=False, heads=H, **settings)
    y = x_btx() @ params["kernel"]
    np.testing.assert_allclose(apply(module, params), y, atol=1e-5)
    target = jax.random.normal(KEY, (B, T, Y))

    def gradients(module, params):
        own = jax.grad(lambda p: jnp.sum((apply(module, p) - target) ** 2))(params)
        return own["adapter_one"]

    own = gradients(module, params)
    assert np.abs(own["router"]["kernel"]).max() <= 1e-5
    if kind is MoLora:
        assert np.abs(own["lora_a"]).max() == 0 and np.abs(own["lora_b"]).max() > 0
        return
    plain, first = site(Ia3, random=False, **settings)
    name = "output_scale" if settings is OUT else "input_scale"
    expected = gradients(plain, {**first, "kernel": params["kernel"]})[name]
    np.testing.assert_allclose(own[f"{name}s"].sum(0), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(own[f"{name}s"][0] - own[f"{name}s"][1]).max() > 0


def test_equal_lora_experts_are_one_lora_whatever_the_router():
    """(5)"""
    module, params = site(MoLora, num_experts=N, **ALL, rank=R)
    one = params["adapter_one"]
    equal = {
        name: jnp.broadcast_to(one[name][:1], one[name].shape) for name in ("lora_a", "lora_b")
    }
    plain = {"kernel": params["kernel"], "adapter_one": {k: v[0] for k, v in equal.items()}}
    single = Site(functools.partial(Lora, **ALL, rank=R))
    got = apply(module, {**params, "adapter_one": {**one, **equal}})
    np.testing.assert_allclose(got, apply(single, plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "settings"), [(Mov, OUT), (MoLora, {**ALL, "rank": R})])
def test_experts_and_the_routers_columns_may_be_permuted(kind, settings):
    """(9); the weights of renormalised choices sum to 1 (8)"""
    module, params = site(kind, num_experts=N, top_k=2, **settings)
    order = np.array([2, 0, 3, 1])
    one = params["adapter_one"]
    moved = {name: leaf[order] for name, leaf in one.items() if name != "router"}
    moved["router"] = {"kernel": one["router"]["kernel"][:, order]}
    got = apply(module, {**params, "adapter_one": moved})
    np.testing.assert_allclose(got, apply(module, params), rtol=1e-6, atol=1e-6)
    if kind is Mov:
        ones = {**one, "output_scales": jnp.ones((N, Y))}
        y = x_btx() @ params["kernel"]
        np.testing.assert_allclose(apply(module, {**params, "adapter_one": ones}), y, rtol=1e-6)


@pytest.mark.parametrize(("kind", "settings"), [(Mov, OUT), (MoLora, {**ALL, "rank": R})])
def test_sentences_route_all_tokens_of_a_row_alike(kind, settings):
    """(11)"""
    module = Site(functools.partial(kind, num_experts=N, router_input="sentence", **settings), H)
    embeddings = jnp.asarray(np.random.default_rng(2).normal(size=(B, 5)), jnp.float32)
    without = nn.meta.unbox(module.init(KEY, x_btx()))["params"]["key"]
    # The width of an encoder-decoder's own table, until a context has another.
    assert without["adapter_one"]["router"]["kernel"].shape == (X, N)
    with pytest.raises(AdapterError, match="of an encoder-decoder's inputs"):
        apply(module, without)
    with sentence_embeddings(embeddings):
        params = nn.meta.unbox(module.init(KEY, x_btx()))["params"]["key"]
        assert params["adapter_one"]["router"]["kernel"].shape == (5, N)
        probs = np.asarray(probabilities(module, params))
        whole = apply(module, params)
        part = apply(module, params, x_btx()[:, 1:])
    assert probs.reshape(B, -1, N).shape[1] == 1 and np.abs(probs[0] - probs[1]).max() > 1e-4
    np.testing.assert_allclose(whole[:, 1:], part, atol=1e-6)


def test_of_a_gated_mlp_the_router_reads_the_activated_branch_and_the_product_is_rescaled():
    """As the paper's code rescales that branch before gating, which is the same product."""
    config = TransformerConfig(vocab_size=8, num_layers=1, embed_dim=X, num_heads=2, mlp_dim=Y)
    make = functools.partial(Mov, outputs=(), inputs=("down",), num_experts=N)
    module = GatedMlp(config=config, adapters=adapter.named(mov=make))
    rng = np.random.default_rng(0)
    params = nn.meta.unbox(jax.eval_shape(module.init, KEY, x_btx()))["params"]
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.3, 0.7, x.shape), x.dtype), params)
    w, x = numpy(params), numpy(x_btx())
    gate, one = x @ w["gate"]["kernel"], w["down"]["adapter_mov"]
    gate = gate / (1 + np.exp(-gate))
    scale = softmax(gate @ one["router"]["kernel"]) @ one["input_scales"]
    expected = (scale * gate * (x @ w["up"]["kernel"])) @ w["down"]["kernel"]
    got = module.apply({"params": params}, x_btx())
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_the_router_multiplies_in_float32_where_the_default_rounds_to_bfloat16():
    module, params = site(Mov, num_experts=2, **IN)
    with jax.default_matmul_precision("default"):
        program = str(jax.make_jaxpr(functools.partial(apply, module))(params))
    assert program.count("(Precision.HIGHEST, Precision.HIGHEST)") == 1


def test_losses_and_metrics_of_a_router():
    settings = {"num_experts": N, "top_k": 1, "balance_loss": 0.01, **OUT}
    module, params = site(Mov, **settings)
    _, written = apply(module, params, mutable=["losses", "metrics"])
    probs = numpy(probabilities(module, params)).reshape(-1, N)
    load = np.eye(N)[probs.argmax(-1)].mean(0)
    (balance,) = written["losses"]["key"]["adapter_one"]["balance"]
    np.testing.assert_allclose(balance, 0.01 * N * (load * probs.mean(0)).sum(), rtol=1e-5)
    metrics = written["metrics"]["key"]["adapter_one"]
    np.testing.assert_allclose(metrics["router_probability"][0], probs.mean(0), rtol=1e-5)
    entropy = -(probs * np.log(probs)).sum(-1).mean()
    np.testing.assert_allclose(metrics["router_entropy"][0], entropy, rtol=1e-5)


def test_the_load_of_a_soft_mixture_is_of_first_choices():
    module, params = site(Mov, num_experts=N, **OUT)
    _, written = apply(module, params, mutable=["metrics"])
    probs = numpy(probabilities(module, params)).reshape(-1, N)
    (load,) = written["metrics"]["key"]["adapter_one"]["router_load"]
    np.testing.assert_allclose(load, np.eye(N)[probs.argmax(-1)].mean(0), rtol=1e-6)
    assert load.max() > 1 / N


def test_more_choices_than_experts_are_refused():
    with pytest.raises(AdapterError, match="top_k = 5 must lie between 1 and num_experts = 4"):
        site(Mov, num_experts=N, top_k=5, **OUT)
    with pytest.raises(AdapterError, match="dora = False"):
        site(MoLora, num_experts=N, dora=True, rank=R, **ALL)
    with pytest.raises(AdapterError, match="top_k = 2 must lie between 1 and num_experts = 1"):
        Mov(num_experts=1, top_k=2)


@pytest.mark.parametrize("settings", [{"num_experts": N}, {"num_experts": 1, "top_k": 1}])
def test_a_balance_loss_without_a_choice_of_experts_is_refused_when_it_is_made(settings):
    with pytest.raises(AdapterError, match="balance_loss = 0.01 balances the load of chosen"):
        Mov(balance_loss=0.01, **settings)
