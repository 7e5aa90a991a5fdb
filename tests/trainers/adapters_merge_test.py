"""Adapters with other methods: each model with merged kernels is the adapted model, also when it decodes from a cache."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.adapters import adapter
from espalier.model.adapters.bottleneck import Bottleneck
from espalier.model.adapters.ia3 import Ia3
from espalier.model.adapters.lora import Lora
from espalier.model.adapters.merge import Merge
from espalier.model.attention import Attention
from espalier.model.bam import moa
from espalier.model.config import TransformerConfig
from espalier.model.kv_cache import policies
from espalier.model.low_rank.lowrank import Factorisation, LowRankDense
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.mov.molora import MoLora
from espalier.model.transformer import Block, Transformer
from espalier.model.transforms import base
from espalier.model.transforms.base import Source, TransformError
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.decoding import prefill

LORA = functools.partial(Lora, rank=2, alpha=2.0)
FACTORS = functools.partial(LowRankDense, factorisation=Factorisation(rank=0.5))


def model_of(adapters, *, mlp=GatedMlp, attention=Attention, dense=None, scan=False):
    settings = {"adapters": adapters, **({} if dense is None else {"dense": dense})}
    config = TransformerConfig(
        vocab_size=24,
        num_layers=2 if scan else 1,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=12,
        scan_layers=scan,
    )
    plain = functools.partial(Attention, qkv_bias=True, **settings)
    if attention is not Attention:
        plain = moa.experts_of(attention=plain, moa=functools.partial(attention, num_experts=2))
    mixture = {} if mlp is not MoeMlp else {"num_experts": 3, "adapters": adapters}
    mlp = functools.partial(mlp, **(mixture or settings))
    block = functools.partial(Block, attention=plain, mlp=mlp)
    return Transformer(config=config, block=block)


def made(slots, **options):
    """(adapted model, its parameters, the base model, merged parameters)"""
    adapters = adapter.named(**slots)
    model = model_of(adapters, **options)
    tokens = jnp.zeros((1, 4), jnp.int32)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), x.dtype), shapes)
    flat = state_tree.flatten(params)
    source = Source("run", {name: leaf.shape for name, leaf in flat.items()})
    target = {name: leaf.shape for name, leaf in flat.items() if "/adapter_" not in name}
    recipes = Merge(adapters).plan([source], target)
    merged = state_tree.nest(base.apply(recipes, lambda _, name: np.asarray(flat[name])))
    return model, params, model_of(None, **options), merged


TOKENS = jax.random.randint(jax.random.key(1), (2, 8), 1, 24)


@pytest.mark.parametrize(
    ("slots", "options"),
    [
        ({"lora": LORA}, {"scan": True}),
        ({"dora": functools.partial(LORA, dora=True)}, {"scan": True}),
        ({"ia3": Ia3}, {"scan": True}),
        ({"lora": LORA}, {"mlp": MoeMlp}),
        ({"ia3": Ia3}, {"mlp": MoeMlp, "scan": True}),
        ({"lora": functools.partial(LORA, dora=True, layers=(".*/attention/.*",))}, {"attention": moa.MixtureOfAttention}),
        ({"ia3": Ia3}, {"dense": FACTORS}),
    ],
)  # fmt: skip
def test_merged_kernels_are_the_adapted_model(slots, options):
    model, params, plain, merged = made(slots, **options)
    want = jax.jit(model.apply)({"params": params}, TOKENS)
    got = jax.jit(plain.apply)({"params": merged}, TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize(
    ("slots", "options", "words"),
    [
        ({"lora": LORA}, {"dense": FACTORS}, "factorised"),
        ({"b": functools.partial(Bottleneck, width=2)}, {}, "not linear"),
        (
            {"m": functools.partial(MoLora, rank=2, num_experts=3)},
            {},
            "3 experts depend on the token",
        ),
    ],
)
def test_what_has_no_merged_kernel_is_refused(slots, options, words):
    with pytest.raises(TransformError, match=words):
        made(slots, **options)


def test_a_compressed_cache_is_that_of_the_merged_model():
    """SnapKV keeps the keys and values of adapted projections."""
    model, params, plain, merged = made({"ia3": Ia3})
    policy = policies.policy_named("snapkv", capacity=5, window=2, kernel=1)

    def decoded(model, params):
        first, caches = prefill.prefill(model, params, policy, TOKENS, jnp.full(2, 8), room=2)
        out = prefill.read(model, params, policy, TOKENS[:, :1], jnp.full((2, 1), 8), caches)
        return first, out.hidden_BTD

    got = jax.jit(functools.partial(decoded, plain))(merged)
    want = jax.jit(functools.partial(decoded, model))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), got, want)
