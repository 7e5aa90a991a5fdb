"""FLOP counts against brute force and against what XLA counts."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from model.config import TransformerConfig
from trainers.telemetry import flops

CONFIG = TransformerConfig(
    vocab_size=96,
    num_layers=4,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=80,
    layer_pattern=("sliding", "full"),
    sliding_window=5,
)


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
    t, d, h = 12, CONFIG.embed_dim, CONFIG.per_head_dim
    spec = jax.ShapeDtypeStruct

    def count(spec_a, spec_b):
        compiled = jax.jit(jnp.dot).lower(spec(spec_a, jnp.float32), spec(spec_b, jnp.float32))
        return compiled.cost_analysis()["flops"]

    weights = [(d, 4 * h), (d, 2 * h), (d, 2 * h), (4 * h, d), (d, 80), (80, d)]
    weights += [(d, 80)] * gated
    expected = CONFIG.num_layers * sum(count((t, i), (i, o)) for i, o in weights)
    expected += count((t, d), (d, 96))
    # Attention: every query against the keys it sees, scores and weighted sum, for each head.
    for layer in range(CONFIG.num_layers):
        window = 5 if layer % 2 == 0 else t
        pairs = sum(min(q + 1, window) for q in range(t))
        expected += 4 * 2 * (2 * h * pairs)
    got = flops.forward_flops_per_token(CONFIG, t, gated=gated) * t
    assert got == pytest.approx(expected, rel=1e-12)
    assert flops.train_flops_per_token(CONFIG, t, gated=gated) * t == pytest.approx(3 * expected)


def test_llama2_7b_is_near_six_times_its_parameters():
    llama = TransformerConfig(
        vocab_size=32000, num_layers=32, embed_dim=4096, num_heads=32, mlp_dim=11008
    )
    without_attention = flops.train_flops_per_token(llama, 1)
    matrices = 6_738_415_616 - 32000 * 4096 - 65 * 4096  # without embedding rows and norms
    attention = 3 * 32 * 4 * 4096
    assert without_attention == 6 * matrices + attention


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L400", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_kind(kind, peak):
    assert flops.peak_flops(SimpleNamespace(device_kind=kind)) == peak


def test_utilisation():
    v5e = SimpleNamespace(device_kind="TPU v5 lite")
    assert flops.utilisation(1e4, 197e8, [v5e] * 4) == pytest.approx(0.25)
    assert flops.utilisation(1e4, 197e8, [v5e, SimpleNamespace(device_kind="cpu")]) is None
    assert flops.utilisation(1e4, 197e8, []) is None


def test_a_mixture_of_attention_counts_every_experts_heads_and_its_router():
    """BAM's layer at 256 keys (arXiv 2408.08274): 35,651,584 FLOPs of attention, 8,912,896 of one expert."""
    config = TransformerConfig(
        vocab_size=1, num_layers=1, embed_dim=1024, num_heads=8, mlp_dim=2048, head_dim=128
    )

    def attention(**given):
        return flops.forward_flops_per_token(config, 511, **given) - mlp  # 256 keys on average

    mlp = 2 * (3 * 1024 * 2048) + 2 * 1024  # and the logits
    # The paper counts the scores, but not the product with the values.
    values = 2 * 256 * 1024
    assert attention() == 8_912_896 + values
    experts = attention(heads=(32, 32), attention_experts=4)
    assert experts == 35_651_584 + 4 * values + 2 * 4 * 1024
