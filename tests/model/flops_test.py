"""A model's count of its FLOPs against brute force, its trace, XLA, a closed form, and the published counts of BAM."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from espalier.model import flops
from espalier.model.attention import Attention
from espalier.model.bam.moa import MixtureOfAttention
from espalier.model.config import TransformerConfig
from espalier.model.kernels import platform
from espalier.model.low_rank.lowrank import Factorisation, LowRankDense
from espalier.model.mlp import GatedMlp, Mlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.nexus.domain_router import DomainRouter
from espalier.model.transformer import Block, Transformer
from espalier.trainers import initialise
from espalier.trainers.inputs import PackedTokens

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


def forward(model, length, variables=None):
    return model.forward_flops(PackedTokens(length).arrays(1), variables)


def closed_form(config, length, *, experts=0, top_k=1, heads=None, attention_experts=0):
    """FLOPs of a token from sizes alone; MLPs are gated, and both mixtures have a linear router."""
    d, h = config.embed_dim, config.per_head_dim
    queries, keys_values = heads or (config.num_heads, config.kv_heads)
    projections = d * h * 2 * (queries + keys_values) + d * attention_experts
    mlp = top_k * 3 * d * config.mlp_dim + d * experts
    total = 2.0 * config.vocab_size * d
    for layer in range(config.num_layers):
        keys = flops.mean_keys(length, config.layer_kind(layer).window)
        total += 2.0 * (projections + mlp) + 4.0 * keys * queries * h
    return total


@pytest.mark.parametrize("window", [None, 1, 5, 12, 40])
def test_mean_keys_by_counting(window):
    length = 12
    seen = [
        sum(1 for k in range(length) if k <= q and (window is None or k > q - window))
        for q in range(length)
    ]
    assert flops.mean_keys(length, window) == pytest.approx(sum(seen) / length)


@pytest.mark.parametrize("gated", [True, False])
def test_forward_count_matches_xla_on_the_products_of_a_row(gated):
    config = dataclasses.replace(CONFIG, mlp_dim=80)
    t, d, h = 12, config.embed_dim, config.per_head_dim
    spec = jax.ShapeDtypeStruct

    def count(spec_a, spec_b):
        compiled = jax.jit(jnp.dot).lower(spec(spec_a, jnp.float32), spec(spec_b, jnp.float32))
        return compiled.cost_analysis()["flops"]

    weights = [(d, 4 * h), (d, 2 * h), (d, 2 * h), (4 * h, d), (d, 80), (80, d)]
    weights += [(d, 80)] * gated
    expected = config.num_layers * sum(count((t, i), (i, o)) for i, o in weights)
    expected += count((t, d), (d, 96))
    # Attention: every query against the keys it sees, scores and weighted sum, for each head.
    for layer in range(config.num_layers):
        window = 5 if layer % 2 == 0 else t
        pairs = sum(min(q + 1, window) for q in range(t))
        expected += 4 * 2 * (2 * h * pairs)
    model = model_of(config, mlp=GatedMlp if gated else Mlp)
    assert forward(model, t) * t == pytest.approx(expected, rel=1e-12)


def test_llama2_7b_is_near_six_times_its_parameters():
    llama = TransformerConfig(
        vocab_size=32000, num_layers=32, embed_dim=4096, num_heads=32, mlp_dim=11008
    )
    without_attention = 3 * forward(Transformer(config=llama, tie_embeddings=False), 1)
    matrices = 6_738_415_616 - 32000 * 4096 - 65 * 4096  # without embedding rows and norms
    attention = 3 * 32 * 4 * 4096
    assert without_attention == 6 * matrices + attention


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
    counted = forward(model, length)
    assert rows * length * (counted + unseen) + once == pytest.approx(traced, rel=1e-12)
    assert forward(model, length, variables) == counted


@pytest.mark.parametrize("name", ["dense", "mixture", "attentions"])
def test_sizes_alone_give_the_same_count(name):
    given = {
        "dense": {},
        "mixture": {"experts": EXPERTS, "top_k": 2},
        "attentions": {"heads": (12, 6), "attention_experts": 3},
    }[name]
    expected = closed_form(CONFIG, 9, **given)
    counted = forward(model_of(**MODELS[name]), 9)
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
    ours = forward(model, 511) - 2 * 1024
    ours -= attentions * 2 * 256 * 1024
    routers = 2 * 1024 * (experts + (attentions if attentions > 1 else 0))
    assert ours == attention + top_k * 6 * 1024 * 2048 + routers
    # What is printed has one FFN router more, and is that to its last digit.
    assert round((ours + 2 * 1024 * experts) / 1e6, 2) == layer


def test_a_mixture_of_attention_counts_every_experts_heads_and_its_router():
    """BAM's layer at 256 keys (arXiv 2408.08274): 35,651,584 FLOPs of attention, 8,912,896 of one expert."""
    config = TransformerConfig(
        vocab_size=1, num_layers=1, embed_dim=1024, num_heads=8, mlp_dim=2048, head_dim=128
    )

    def attention(factory):
        return forward(model_of(config, attention=factory), 511) - mlp  # 256 keys on average

    mlp = 2 * (3 * 1024 * 2048) + 2 * 1024  # and the logits
    # The paper counts the scores, but not the product with the values.
    values = 2 * 256 * 1024
    assert attention(Attention) == 8_912_896 + values
    experts = attention(functools.partial(MixtureOfAttention, num_experts=4))
    assert experts == 35_651_584 + 4 * values + 2 * 4 * 1024
