"""The calculated bytes of caches are those of the buffers, and the longest prompt is the last that fits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.kv_cache.by_layer import ByLayer
from espalier.model.kv_cache.policies import policy_named
from espalier.model.transformer import Transformer
from espalier.trainers.decoding.prefill import prefill
from espalier.trainers.snapkv import replay
from tests.drawn import drawn

CONFIG = TransformerConfig(
    vocab_size=16, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=8, scan_layers=False
)
SNAPKV = policy_named("snapkv", capacity=8, window=2)


@pytest.fixture(scope="module")
def model():
    model = Transformer(config=CONFIG)
    return model, nn.meta.unbox(drawn(model, jnp.zeros((1, 4), jnp.int32)))


@pytest.mark.parametrize(
    "policy", [policy_named("full"), SNAPKV, ByLayer((policy_named("full"), SNAPKV))]
)
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


def test_log_probabilities_are_those_of_the_whole_text(model):
    rng = np.random.default_rng(0)
    tokens_BT = jnp.asarray(rng.integers(1, 16, (2, 12)))
    lengths_B, counts_B = jnp.array([8, 8]), jnp.array([4, 2])
    recording = replay.record(*model, tokens_BT[:, :8], lengths_B)
    full = policy_named("full")
    caches = replay.compressed(model[0], full, recording, room=4)
    state = caches, lengths_B, recording.logits_BV, tokens_BT[:, 8:], counts_B
    found = replay.log_probabilities(*model, full, *state)
    logits = model[0].apply({"params": model[1]}, tokens_BT)
    wanted = jax.nn.log_softmax(logits)[:, 7:11]
    wanted = jnp.take_along_axis(wanted, tokens_BT[:, 8:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    np.testing.assert_allclose(found[1], [*wanted[1, :2], 0, 0], atol=1e-5)
    # Of a compressed prompt, the first token alone is the whole prompt's.
    caches = replay.compressed(model[0], SNAPKV, recording, room=4)
    pruned = replay.compressed(
        model[0], policy_named("snapkv", capacity=3, window=1), recording, room=4
    )
    same = replay.log_probabilities(*model, full, caches, *state[1:])
    other = replay.log_probabilities(*model, full, pruned, *state[1:])
    np.testing.assert_allclose(same, found, atol=1e-5)
    np.testing.assert_allclose(other[:, 0], found[:, 0], atol=1e-6)
    assert not np.allclose(other[:, 1], found[:, 1], atol=1e-4)
