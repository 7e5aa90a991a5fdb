"""A layer knows its depth: an attention and an MLP that read it, scanned, unrolled, recomputed, on a mesh, with caches.

The attention scales its heads by 0.8 - 0.6 exp(-0.3 depth), as differential attention (arXiv 2410.05258) does.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.attention import Attention
from espalier.model.config import LayerKind, TransformerConfig
from espalier.model.kv_cache import policies
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.transformer import Block, Transformer
from espalier.model.transforms import layer_stack
from espalier.trainers import partitioning
from espalier.trainers.decoding import prefill
from tests.drawn import drawn

TOKENS = jax.random.randint(jax.random.key(1), (8, 10), 0, 40)
L = 4


class DeepAttention(Attention):
    """Scales its heads by depth."""

    def gate_heads(self, heads_BTNH, x_BTD, segments_BT):
        self.sow("intermediates", "depth", jnp.asarray(self.kind.depth))
        return heads_BTNH * (0.8 - 0.6 * jnp.exp(-0.3 * self.kind.depth))


class DeepMlp(GatedMlp):
    """Divides its output by 1 + depth."""

    def __call__(self, x_BTD, **context):
        return super().__call__(x_BTD, **context) / (1 + self.kind.depth)


def make(attention=DeepAttention, mlp=DeepMlp, pattern=("sliding", "full"), **settings):
    config = TransformerConfig(
        vocab_size=40,
        num_layers=L,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=24,
        layer_pattern=pattern,
        sliding_window=4,
        **settings,
    )
    return Transformer(config=config, block=functools.partial(Block, attention=attention, mlp=mlp))


def params_of(model):
    return nn.unbox(drawn(model, TOKENS))


def logits(model, params):
    return jax.jit(lambda params: model.apply({"params": params}, TOKENS))(params)


@pytest.mark.parametrize("pattern", [("full",), ("sliding", "full")])
def test_scanned_and_unrolled_layers_have_the_same_depths(pattern):
    model = make(pattern=pattern)
    params = params_of(model)

    def read(model, params):
        run = jax.jit(lambda p: model.apply({"params": p}, TOKENS, mutable=["intermediates"]))
        found, written = run(params)
        blocks = written["intermediates"]["layers"]
        depths = {name: node["attention"]["depth"][0].tolist() for name, node in blocks.items()}
        return found, depths

    scanned, stacked = read(model, params)
    found, depths = read(layer_stack.unrolled(model), layer_stack.unroll(params, model.config))
    np.testing.assert_allclose(scanned, found, atol=1e-5)
    period = len(pattern)
    assert stacked == {f"block_{p}": list(range(p, L, period)) for p in range(period)}
    assert depths == {f"block_{i}": i for i in range(L)}
    plain = make(attention=Attention, mlp=GatedMlp, pattern=pattern)
    assert float(jnp.abs(scanned - logits(plain, params)).max()) > 1e-2


@pytest.mark.parametrize(("remat", "scan"), [("full", False), ("dots", True)])
def test_recomputed_layers_have_the_same_gradients(remat, scan):
    params = params_of(make(scan_layers=scan))

    def gradient(remat):
        model = make(scan_layers=scan, remat=remat)
        loss = lambda params: jnp.mean(model.apply({"params": params}, TOKENS) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6), gradient(remat), gradient("none")
    )


def test_on_a_mesh_layers_have_the_same_depths():
    model = make()
    params = params_of(model)
    want = logits(model, params)
    mesh, rules = (
        partitioning.make_mesh(shape={"fsdp": 4, "tensor": 2}),
        partitioning.RULE_SETS["fsdp_tp"],
    )
    with partitioning.use_mesh(mesh, rules):
        np.testing.assert_allclose(logits(model, params), want, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "snapkv"])
def test_decoding_with_caches_has_the_depths_of_training(name):
    """Policies have room for the whole text, so that none drops anything."""
    model = make()
    params = params_of(model)
    want = logits(model, params)
    settings = {"full": {}, "snapkv": {"capacity": 32, "window": 4}}[name]
    policy = policies.policy_named(name, **settings)
    model, params = layer_stack.unrolled(model), layer_stack.unroll(params, model.config)

    @jax.jit
    def read(params, prompts_BT):
        lengths_B = jnp.full(len(prompts_BT), prompts_BT.shape[1])
        return prefill.prefill(model, params, policy, prompts_BT, lengths_B, room=10)

    @jax.jit
    def step(params, token_B1, at_B1, caches):
        out = prefill.read(model, params, policy, token_B1, at_B1, caches)
        return model.apply({"params": params}, out.hidden_BTD, method="logits")[:, 0], out.caches

    last_BV, caches = read(params, TOKENS[:, :6])
    np.testing.assert_allclose(last_BV, want[:, 5], atol=1e-4)
    for t in range(6, 10):
        at_B1 = jnp.full((len(TOKENS), 1), t)
        found, caches = step(params, TOKENS[:, t : t + 1], at_B1, caches)
        np.testing.assert_allclose(found, want[:, t], atol=1e-4)


def test_the_shared_expert_of_a_mixture_knows_its_depth_too():
    def output(depth):
        layer = MoeMlp(
            config=make().config, kind=LayerKind(depth=depth), num_experts=2, shared=DeepMlp
        )
        x_BTD = jnp.ones((1, 3, 16))
        params = nn.meta.unbox(layer.init(jax.random.key(0), x_BTD))
        return layer.apply(params, x_BTD), layer.clone(shared=None).apply(params, x_BTD)

    (first, routed), (third, _) = output(0), output(2)
    np.testing.assert_allclose((third - routed) * 3, first - routed, rtol=1e-4)


def test_kinds_of_two_depths_are_equal():
    assert LayerKind(window=3, depth=1) == LayerKind(window=3, depth=2) != LayerKind(window=4)
    assert len({LayerKind(depth=jnp.zeros(())), LayerKind(depth=2)}) == 1
