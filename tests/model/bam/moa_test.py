"""Mixtures of attention experts: limits in which they are one expert, order, causality, caches, sizes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.attention import Attention
from espalier.model.bam import moa
from espalier.model.config import TransformerConfig
from espalier.model.hf.family import UnsupportedModel
from espalier.model.hf.registry import family_of_model
from espalier.model.kv_cache import policies
from espalier.model.mlp import GatedMlp
from espalier.model.transformer import Block, Transformer
from espalier.trainers import initialise
from espalier.trainers.decoding import prefill
from tests.drawn import drawn

E, D, N, K, H = 3, 16, 4, 2, 8
CONFIG = TransformerConfig(
    vocab_size=32, num_layers=1, embed_dim=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=24,
    scan_layers=False,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(9), (2, 10), 1, 32)
FORMS = [(None, False), (None, True), (1, False), (2, True)]


def model_of(attention=Attention, layout="parallel", config=CONFIG):
    block = functools.partial(Block, attention=attention, mlp=GatedMlp, layout=layout)
    return Transformer(config=config, block=block)


def mixed(top_k=None, shared_kv=False, **settings):
    return model_of(experts(E, top_k=top_k, shared_kv=shared_kv, **settings))


def experts(count, **settings):
    made = functools.partial(moa.MixtureOfAttention, num_experts=count, **settings)
    return moa.experts_of(moa=made)


@functools.cache
def params_of(model_key, seed=0):
    model = model_of() if model_key is None else mixed(*model_key)
    return nn.meta.unbox(drawn(model, TOKENS, seed=seed))


def logits(model, params, tokens=TOKENS):
    return jax.jit(model.apply)({"params": params}, tokens)


def joined(parts, axis, shared_kv):
    """Kernels of experts side by side, in the order of the heads: [E, K, G], or [K, E, G] of shared ones."""
    heads = np.stack([np.moveaxis(part, axis, -1) for part in parts])  # [E, ..., N * H]
    heads = heads.reshape(*heads.shape[:-1], K, N // K, H)
    heads = np.moveaxis(heads, 0, -3 if shared_kv else -4)
    return np.moveaxis(heads.reshape(*heads.shape[:-4], -1), -1, axis)


def upcycled(sources, shared_kv, router):
    """Parameters of a mixture of dense models; what is no expert's is the first one's."""
    first = jax.tree.map(np.asarray, sources[0])
    layers = {}
    for name, block in first["layers"].items():
        all_of = [s["layers"][name]["attention"] for s in sources]

        def kernels(field, all_of=all_of):
            return [np.asarray(one[field]["kernel"]) for one in all_of]

        attention = {
            "query": {"kernel": joined(kernels("query"), 1, shared_kv)},
            "out": {"kernel": joined(kernels("out"), 0, shared_kv)},
            "router": {"kernel": router},
        }
        for field in ("key", "value"):
            found = kernels(field)
            attention[field] = {"kernel": found[0] if shared_kv else np.concatenate(found, 1)}
        layers[name] = {**block, "attention": attention}
    return {**first, "layers": layers}


@pytest.mark.parametrize("shared_kv", [False, True])
def test_identical_experts_softly_mixed_are_the_dense_model(shared_kv):
    dense = params_of(None)
    router = np.random.default_rng(0).normal(size=(D, E)).astype(np.float32)
    params = upcycled([dense] * E, shared_kv, router)
    want = logits(model_of(), dense)
    np.testing.assert_allclose(logits(mixed(None, shared_kv), params), want, atol=1e-5)
    one = logits(mixed(1, shared_kv), params)  # only a part of it, by its probability
    assert np.abs(one - want).max() > 1e-3


def test_every_expert_attends_by_itself_and_is_weighed_by_the_querys_gate():
    """Against the sum written out with E attentions, for keys and values of their own and of the first's."""
    x = jax.random.normal(jax.random.key(1), (2, 10, D))
    positions = jnp.broadcast_to(jnp.arange(10)[None], (2, 10))
    one = Attention(config=CONFIG)
    init = jax.jit(lambda key: one.init(key, x, positions_BT=positions))
    experts = [nn.meta.unbox(init(jax.random.key(i)))["params"] for i in range(E)]
    attended = jax.jit(lambda params: one.apply({"params": params}, x, positions_BT=positions)[0])
    router = np.random.default_rng(2).normal(size=(D, E)).astype(np.float32)
    gates = np.asarray(jax.nn.softmax(x @ router, axis=-1), np.float64)
    for shared_kv in (False, True):
        used = [
            {**e, "key": experts[0]["key"], "value": experts[0]["value"]} if shared_kv else e
            for e in experts
        ]
        outs = [attended(e) for e in used]
        want = sum(gates[..., j, None] * np.asarray(outs[j]) for j in range(E))
        sources = [{"layers": {"a": {"attention": e}}} for e in used]
        params = upcycled(sources, shared_kv, router)["layers"]["a"]["attention"]
        layer = moa.MixtureOfAttention(config=CONFIG, num_experts=E, shared_kv=shared_kv)
        found, _ = jax.jit(layer.apply)({"params": params}, x, positions_BT=positions)
        np.testing.assert_allclose(found, want, atol=1e-5)
        best = np.sort(gates, -1)[..., -2:].min(-1, keepdims=True)
        apply = jax.jit(layer.clone(top_k=2).apply)
        two = apply({"params": params}, x, positions_BT=positions)[0]
        kept = gates * (gates >= best)
        want = sum(kept[..., j, None] * np.asarray(outs[j]) for j in range(E))
        np.testing.assert_allclose(two, want, atol=1e-5)


@functools.partial(jax.jit, static_argnums=(0, 2, 5))
def prompted(model, params, policy, tokens, lengths, room):
    """Logits after prompts, and caches."""
    return prefill.prefill(model, params, policy, tokens, lengths, room=room)


@functools.partial(jax.jit, static_argnums=(0, 2))
def read(model, params, policy, tokens, positions, caches):
    """What `prefill.read` returns, and the logits."""
    out = prefill.read(model, params, policy, tokens, positions, caches)
    return out, model.apply({"params": params}, out.hidden_BTD, method="logits")


@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_a_later_one_and_caches_give_what_the_whole_forward_does(form):
    model, params = mixed(*form), params_of(form)
    whole = logits(model, params)
    changed = logits(model, params, TOKENS.at[:, 6:].set(5))
    np.testing.assert_allclose(changed[:, :6], whole[:, :6], atol=1e-6)
    policy = policies.policy_named("full")
    lengths = jnp.full(2, 6)
    last, caches = prompted(model, params, policy, TOKENS[:, :6], lengths, 10)
    np.testing.assert_allclose(last, whole[:, 5], atol=1e-4)
    for t in range(6, 10):
        at = jnp.full((2, 1), t)
        out, logits_BTV = read(model, params, policy, TOKENS[:, t : t + 1], at, caches)
        caches = out.caches
        np.testing.assert_allclose(logits_BTV[:, 0], whole[:, t], atol=1e-4)


def test_a_cache_has_every_experts_keys_and_values_or_those_of_a_dense_model():
    def held(model):
        caches = jax.eval_shape(
            lambda: prefill.empty_caches(model, policies.policy_named("full"), batch=2, length=10)
        )
        return sum(x.size for x in jax.tree.leaves(caches) if jnp.issubdtype(x.dtype, jnp.floating))

    dense = held(model_of())
    assert held(mixed(None, True)) == dense and held(mixed()) == held(mixed(1)) == E * dense
    assert mixed().layer_settings()[0].attention.query_heads == E * N


@pytest.mark.parametrize("policy", ["snapkv", "streaming_llm", "h2o"])
@pytest.mark.parametrize("shared_kv", [False, True])
def test_compressing_policies_work_with_all_heads(policy, shared_kv):
    form = (None, shared_kv)
    model, params = mixed(*form), params_of(form)
    settings = {
        "snapkv": {"capacity": 6, "window": 2},
        "streaming_llm": {"capacity": 6},
        "h2o": {"capacity": 6},
    }
    chosen = policies.policy_named(policy, **settings[policy])
    last, caches = prompted(model, params, chosen, TOKENS, jnp.full(2, 10), 12)
    np.testing.assert_allclose(last, logits(model, params)[:, -1], atol=1e-4)
    out, _ = read(model, params, chosen, TOKENS[:, :1], jnp.full((2, 1), 10), caches)
    assert np.isfinite(out.hidden_BTD).all()


def test_the_losses_and_statistics_of_a_router_are_those_of_its_gates():
    model, params = mixed(1, False, balance_loss=0.5), params_of((1, False))
    watched = ["losses", "metrics", "intermediates"]
    _, seen = jax.jit(functools.partial(model.apply, mutable=watched))({"params": params}, TOKENS)
    probs = np.asarray(seen["intermediates"]["layers"]["block_0"]["attention"]["router_probs"][0])
    load = np.eye(E)[probs.argmax(-1)].mean((0, 1))
    want = 0.5 * E * float((load * probs.mean((0, 1))).sum())
    found = seen["losses"]["layers"]["block_0"]["attention"]["balance"][0]
    assert float(found) == pytest.approx(want, rel=1e-5)
    load_found = seen["metrics"]["layers"]["block_0"]["attention"]["router_load"][0]
    np.testing.assert_allclose(load_found, load, atol=1e-6)


def test_parameters_are_those_of_bams_small_model():
    """Expert-KV and Shared-KV of four experts over the 590M seed, attention's part, exactly."""
    config = TransformerConfig(
        vocab_size=256, num_layers=6, embed_dim=1024, num_heads=8, mlp_dim=2048, head_dim=128
    )

    def attention(factory):
        shapes = initialise.abstract_variables(model_of(factory, config=config))["params"]
        return sum(x.size for x in jax.tree.leaves(shapes["layers"]["block_0"]["attention"]))

    router = 6 * 1024 * 4
    assert attention(experts(4)) == 6 * 4 * 4 * 1024**2 + router
    shared = 6 * (2 * 4 + 2) * 1024**2 + router
    assert attention(experts(4, shared_kv=True)) == shared
    # What the paper's totals add to those of BTX: 776,002,560 and 738,253,824 beside 700,480,512.
    dense = 6 * 4 * 1024**2
    assert 6 * 4 * 4 * 1024**2 + router - dense == 776_002_560 - 700_480_512
    assert shared - dense == 738_253_824 - 700_480_512


def test_what_cannot_be_mixed_or_exported():
    with pytest.raises(ValueError, match="top_k = 4 must lie between 1 and num_experts = 3"):
        mixed(4).init(jax.random.key(0), TOKENS)
    with pytest.raises(UnsupportedModel):
        family_of_model(mixed())
