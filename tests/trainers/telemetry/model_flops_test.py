"""Counts of a model's own FLOPs against its trace, the sizes' closed form, and the published ones of BAM."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from model.attention import Attention
from model.bam.moa import MixtureOfAttention
from model.config import TransformerConfig
from model.kernels import platform
from model.low_rank.lowrank import Factorisation, LowRankDense
from model.mlp import GatedMlp, Mlp
from model.moe.moe import MoeMlp
from model.nexus.domain_router import DomainRouter
from model.transformer import Block, Transformer
from trainers import initialise
from trainers.telemetry import flops, model_flops

CONFIG = TransformerConfig(
    vocab_size=96,
    num_layers=4,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=24,
    layer_pattern=("sliding", "full"),
    sliding_window=5,
)
EXPERTS, DOMAIN = 6, 7

MIXTURE = functools.partial(MoeMlp, num_experts=EXPERTS, top_k=2)
NEXUS = functools.partial(
    MIXTURE, router=functools.partial(DomainRouter, domain_dim=DOMAIN), shared=GatedMlp
)
ATTENTIONS = functools.partial(MixtureOfAttention, num_experts=3)
SHARED_KV = functools.partial(ATTENTIONS, shared_kv=True, top_k=1)
QUARTER = functools.partial(LowRankDense, factorisation=Factorisation(rank=0.25))
LOW_RANK = functools.partial(GatedMlp, dense=QUARTER)
MODELS = {
    "dense": {},
    "two_matrices": {"mlp": Mlp},
    "factors": {"mlp": LOW_RANK},
    "mixture": {"mlp": MIXTURE},
    "nexus": {"mlp": NEXUS},
    "attentions": {"attention": ATTENTIONS},
    "both": {"attention": SHARED_KV, "mlp": MIXTURE},
}


def model_of(config=CONFIG, **parts):
    return Transformer(config=config, block=functools.partial(Block, **parts))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_its_trace_multiplies(name, scan):
    config = TransformerConfig(**{**vars(CONFIG), "scan_layers": scan})
    model, rows, length = model_of(config, **MODELS[name]), 3, 8
    variables = nn.meta.unbox(initialise.abstract_variables(model))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    with platform.use_reference_forms():
        traced = flops.traced_flops(model.apply, variables, tokens)
    # The trace multiplies every query with every key, sums experts up as a product with their weights, and
    # projects the domains once.
    heads = {"attentions": 12, "both": 12}.get(name, 4)
    windows = [flops.mean_keys(length, config.layer_kind(i).window) for i in range(4)]
    unseen = sum(4 * (length - keys) * heads * 16 for keys in windows)
    unseen += 4 * 2 * 2 * 32 if name in ("mixture", "nexus", "both") else 0
    once = 4 * 2 * EXPERTS * (2 * DOMAIN * 32 + 32 * 32) if name == "nexus" else 0
    counted = model_flops.forward_flops_per_token(model, length)
    assert rows * length * (counted + unseen) + once == pytest.approx(traced, rel=1e-12)
    assert model_flops.train_flops_per_token(model, length, variables["params"]) == 3 * counted


@pytest.mark.parametrize("name", ["dense", "mixture", "attentions"])
def test_sizes_alone_give_the_same_count(name):
    given = {
        "dense": {},
        "mixture": {"experts": EXPERTS, "top_k": 2},
        "attentions": {"heads": (12, 6), "attention_experts": 3},
    }[name]
    expected = flops.train_flops_per_token(CONFIG, 9, **given)
    counted = model_flops.train_flops_per_token(model_of(**MODELS[name]), 9)
    assert counted == pytest.approx(expected, rel=1e-12)


def test_backward_through_groups_is_twice_the_forward():
    sizes = jnp.array([1, 4, 0])
    shapes = jax.ShapeDtypeStruct((5, 6), jnp.float32), jax.ShapeDtypeStruct((3, 6, 7), jnp.float32)

    def loss(rows, kernel):
        return jnp.sum(jax.lax.ragged_dot(rows, kernel, sizes) ** 2)

    assert flops.traced_flops(loss, *shapes) == 2 * 5 * 6 * 7
    assert flops.traced_flops(jax.grad(loss, (0, 1)), *shapes) == 3 * 2 * 5 * 6 * 7


@pytest.mark.parametrize(
    ("experts", "top_k", "attentions", "layer", "attention"),
    [
        (4, 1, 1, 21.51, 8_912_896),
        (4, 1, 4, 48.26, 35_651_584),
        (6, 3, 1, 46.69, 8_912_896),
    ],
)
def test_a_layer_of_bams_comparison(experts, top_k, attentions, layer, attention):
    """BAM (arXiv 2408.08274): FLOPs of a token in a layer of BTX, of BAM, and of BTX with three of six experts."""
    config = TransformerConfig(
        vocab_size=1, num_layers=1, embed_dim=1024, num_heads=8, mlp_dim=2048, head_dim=128
    )
    moe = functools.partial(MoeMlp, num_experts=experts, top_k=top_k)
    moa = functools.partial(MixtureOfAttention, num_experts=attentions)
    model = model_of(config, mlp=moe, attention=moa if attentions > 1 else Attention)
    # Over 511 tokens the average of keys is the paper's 256. It does not count the product with the values.
    ours = model_flops.forward_flops_per_token(model, 511) - 2 * 1024
    ours -= attentions * 2 * 256 * 1024
    routers = 2 * 1024 * (experts + (attentions if attentions > 1 else 0))
    assert ours == attention + top_k * 6 * 1024 * 2048 + routers
    # What is printed has one FFN router more, and is that to its last digit.
    assert round((ours + 2 * 1024 * experts) / 1e6, 2) == layer
