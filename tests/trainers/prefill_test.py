"""Prompts read at once, in chunks and into every cache policy, and what generation makes of them.

Numbers in docstrings are those of the invariants of SnapKV that the project holds itself to: 1 a
capacity of the whole prompt changes nothing; 2 the first token is the full cache's; 11 a padded batch
equals its rows alone.

Shapes: B batch, T prompt length, M new tokens, S slots, K key/value heads, V vocabulary.
"""


import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import TransformerConfig
from model.kv_cache.policies import POLICIES, policy_named
from model.transformer import Transformer
from trainers.decode import Settings, decode
from trainers.prefill import prefill

V, T, M = 31, 24, 5
LENGTHS = jnp.array([24, 17])
SMALL = {
    "full": {},
    "sliding": {"window": 7},
    "snapkv": {"capacity": 9, "window": 3, "kernel": 3},
    "pyramidkv": {"capacity": 9, "window": 3, "kernel": 3},
    "adakv": {"capacity": 9, "window": 3, "kernel": 3},
    "h2o": {"capacity": 9},
    "tova": {"capacity": 9},
    "streaming_llm": {"capacity": 9, "sinks": 2},
    "random": {"capacity": 9, "window": 3},
    "oracle": {"capacity": 9, "future": 2},
}


def make(pattern=("full", "sliding", "full_nope"), window=6, heads=4, **changes):
    config = TransformerConfig(
        vocab_size=V,
        num_layers=len(pattern),
        embed_dim=16,
        num_heads=heads,
        num_kv_heads=2,
        mlp_dim=16,
        layer_pattern=pattern,
        sliding_window=window,
        scan_layers=False,
        **changes,
    )
    return Transformer(config=config)


def init(model):
    params = jax.jit(lambda key: model.init(key, jnp.zeros((1, 4), jnp.int32)))(jax.random.key(0))
    # Larger than initialised, so that the choices are far from ties.
    return jax.tree.map(lambda x: x * (4.0 if x.ndim > 1 else 1.0), nn.meta.unbox(params)["params"])


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def params(model):
    return init(model)


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(1), (2, T), 0, V)


def generate(model, params, policy, ids, lengths, **how):
    """(logits after the prompts, caches after them, caches in the end, tokens [B, M])."""

    @jax.jit
    def run(params, ids, lengths):
        logits_BV, caches = prefill(model, params, policy, ids, lengths, room=M - 1, **how)
        active_B, keys_B = jnp.ones(len(ids), bool), jax.random.split(jax.random.key(0), len(ids))
        start_B = lengths - policy.future
        settings = Settings(max_new_tokens=M)
        decoded, after = decode(
            model, params, policy, logits_BV, caches, start_B, active_B, keys_B, settings
        )
        return logits_BV, caches, after, decoded.tokens_BM

    return run(params, ids, lengths)


@pytest.fixture(scope="module")
def full(model, params, ids):
    return generate(model, params, policy_named("full"), ids, LENGTHS)


def test_every_policy_has_small_settings_here():
    assert set(SMALL) == set(POLICIES)


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_policy_generates(name, dtype, model, params, ids, full):
    """2: the first token's logits are the full cache's, exactly, whatever is dropped after it."""
    policy = policy_named(name, **SMALL[name])
    logits, caches, after, tokens = generate(model, params, policy, ids, LENGTHS, cache_dtype=dtype)
    if policy.future == 0:
        np.testing.assert_array_equal(logits, full[0])
        np.testing.assert_array_equal(tokens[:, 0], full[3][:, 0])
    assert jax.tree.structure(caches) == jax.tree.structure(after)
    for leaf in jax.tree.leaves(caches):
        assert leaf.ndim == 0 or leaf.shape[0] == 2
    for cache in caches:
        held = cache if hasattr(cache, "k_BKSH") else cache.slots
        assert held.k_BKSH.dtype == (jnp.int8 if dtype else jnp.float32)
        assert policy.view(cache).k_BSKH.shape[1] <= (T + M if name == "full" else 2 * 9 + 2 * M)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"full"}))
def test_a_capacity_of_the_whole_prompt_changes_nothing(name, model, params, ids, full):
    """1: same greedy tokens as the full cache's."""
    at_most = {"window": T + M} if name == "sliding" else {"capacity": T + M}
    policy = policy_named(name, **{**SMALL[name], **at_most})
    lengths = LENGTHS
    if policy.future:  # the continuation that is known is the true one
        ids = jnp.concatenate([ids, ids[:, :2]], axis=1)
        for row, length in enumerate(LENGTHS):
            ids = ids.at[row, length : length + 2].set(full[3][row, :2])
        lengths = LENGTHS + policy.future
    logits, _, _, tokens = generate(model, params, policy, ids, lengths)
    np.testing.assert_allclose(logits, full[0], atol=1e-5)
    np.testing.assert_array_equal(tokens, full[3])
