"""The calculated bytes of caches are those of the buffers, and the longest prompt is the last that fits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.kv_cache.policies import policy_named
from espalier.model.transformer import Transformer
from espalier.trainers import initialise
from espalier.trainers.decoding.prefill import prefill
from espalier.trainers.snapkv import replay

CONFIG = TransformerConfig(
    vocab_size=16, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=8, scan_layers=False
)
SNAPKV = policy_named("snapkv", capacity=8, window=2)


@pytest.fixture(scope="module")
def model():
    model = Transformer(config=CONFIG)
    init = jax.jit(lambda key: initialise.variables(model, key))
    return model, nn.meta.unbox(init(jax.random.key(0)))["params"]


@pytest.mark.parametrize("policy", [policy_named("full"), SNAPKV])
def test_bytes_are_those_of_the_buffers(model, policy):
    tokens, lengths = jnp.ones((3, 20), jnp.int32), jnp.full(3, 20, jnp.int32)
    _, caches = jax.jit(lambda params: prefill(model[0], params, policy, tokens, lengths, room=4))(
        model[1]
    )
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    sizes = {"length": 20, "room": 4, "batch": 3}
    counted = replay.cache_bytes(*model, policy, **sizes)
    assert counted["decode"] == held <= counted["peak"]
    assert replay.cache_bytes(*model, policy, **sizes, depth=3)["decode"] == 3 * held


def test_the_longest_prompt_is_the_last_that_fits(model):
    full = policy_named("full")
    limit = replay.cache_bytes(*model, full, length=40, room=4)["peak"]
    sizes = {"limit": limit, "room": 4, "shortest": 16}
    assert replay.longest_prompt(*model, full, **sizes) == 40
    longest = replay.longest_prompt(*model, SNAPKV, **sizes)
    peaks = [
        replay.cache_bytes(*model, SNAPKV, length=longest + more, room=4)["peak"] for more in (0, 1)
    ]
    assert longest > 40 and peaks[0] <= limit < peaks[1]
