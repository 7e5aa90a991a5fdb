"""The same tokens are kept as by kvpress, with the same weights (goldens/make_kvpress.py).

Shapes: T prompt length, S slots, K key/value heads.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from espalier.model.config import TransformerConfig
from espalier.model.kv_cache.policies import policy_named
from espalier.model.transformer import Transformer
from espalier.trainers.decoding.prefill import prefill

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "kvpress.npz"
SIZES = {"vocab_size": 61, "num_layers": 2, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2}
NAMES = {
    "self_attn.q_proj": ("attention", "query", "kernel"),
    "self_attn.k_proj": ("attention", "key", "kernel"),
    "self_attn.v_proj": ("attention", "value", "kernel"),
    "self_attn.o_proj": ("attention", "out", "kernel"),
    "mlp.gate_proj": ("mlp", "gate", "kernel"),
    "mlp.up_proj": ("mlp", "up", "kernel"),
    "mlp.down_proj": ("mlp", "down", "kernel"),
    "input_layernorm": ("norm", "scale"),
    "post_attention_layernorm": ("mlp_norm", "scale"),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(golden):
    weight = lambda name: golden[f"weights/{name}.weight"]  # noqa: E731
    flat = {
        ("token_embed", "embedding"): weight("model.embed_tokens"),
        ("lm_head", "embedding"): weight("lm_head"),
        ("final_norm", "scale"): weight("model.norm"),
    }
    for layer in range(2):
        for theirs, ours in NAMES.items():
            flat["layers", f"block_{layer}", *ours] = weight(f"model.layers.{layer}.{theirs}").T
    return unflatten_dict(flat)


# kvpress averages over the window, the group and the kernel, and keeps 16 of 40 tokens.
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("snapkv", {"window": 6, "kernel": 5, "pooling": "average", "group_vote": "mean"}),
        ("tova", {}),
    ],
)
def test_the_same_tokens_are_kept(name, settings, golden, params):
    config = TransformerConfig(**SIZES, mlp_dim=48, scan_layers=False)
    model = Transformer(config=config, tie_embeddings=False)
    policy = policy_named(name, capacity=16, **settings)

    @jax.jit
    def run(params, tokens):
        return prefill(model, params, policy, tokens, jnp.array([tokens.shape[1]]), room=0)

    logits, caches = run(params, golden["tokens"].astype(np.int32))
    np.testing.assert_allclose(logits[0], golden["logits"], atol=1e-4)
    for layer, cache in enumerate(caches):
        kept = np.broadcast_to(cache.positions_BXS[0], (2, 16))
        np.testing.assert_array_equal(kept, golden[f"{name}/{layer}"])
        assert not np.array_equal(kept[0], np.arange(24, 40))
