"""The measurements of latency, on a tiny model."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from espalier.launch.papers.snapkv import latency, results
from espalier.model.config import TransformerConfig
from espalier.model.transformer import Transformer
from tests.drawn import drawn

CONFIG = TransformerConfig(
    vocab_size=16, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=8, scan_layers=False
)
SIZES = {"capacity": 40, "new_tokens": 3}
LENGTHS = (48, 64)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(latency, "CONFIG", CONFIG)
    model = Transformer(config=CONFIG)
    return model, nn.meta.unbox(drawn(model, jnp.zeros((1, 4), jnp.int32)))


def test_times_and_bytes_are_measured_for_both_caches(model):
    cells = latency.latencies(*model, LENGTHS, batch=2, repeats=2, **SIZES)
    for name, tokens in (("full", 64 + 3), ("snapkv", 40 + 3)):
        cell = cells[name]["64"]
        assert len(cell["ms"]) == 2 and min(cell["ms"]) > 0
        # Keys and values of two layers, and some positions.
        assert cell["cache_bytes"] >= 2 * 2 * 2 * tokens * 16 * 4
        assert cell["peak_bytes"] > cell["cache_bytes"]
    assert cells["snapkv"]["48"]["cache_bytes"] == cells["snapkv"]["64"]["cache_bytes"]
    read = latency.prefill_seconds(*model, LENGTHS, **SIZES)
    assert set(read) == {"full", "snapkv"} and set(read["full"]) == {"48", "64"}
    longest = latency.longest_prompts(*model, 64, **SIZES)
    assert longest["full"] == 64 < longest["snapkv"]


def test_slopes_are_of_prompts_that_exceed_the_capacity():
    cells = {str(n): {"ms": [1 + n / 1024] * 2} for n in (2048, 4096)}
    short = {"1024": {"ms": [100.0] * 2}}
    settings = {"capacity": 2048}
    timed = results.Latency(settings, {"1": {"full": {**short, **cells}}}, {}, {})
    assert timed.slopes("1", "full") == pytest.approx([1.0, 1.0])
