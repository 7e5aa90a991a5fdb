"""Slots: in order, in a ring, and as int8.

Shapes: B batch, T queries, S slots, N query heads, K key/value heads, X heads of positions, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.kernels.attention_ops import dot_product_attention
from espalier.model.kv_cache import slots

B, S, N, K, H = 2, 6, 4, 2, 8


def filled(seed=0, scale=1.0):
    k, v = (
        scale * jax.random.normal(key, (B, S, K, H))
        for key in jax.random.split(jax.random.key(seed))
    )
    at = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    empty = slots.empty((B, K, S, H), "float32")
    return empty.put(k, v, at), k, v


def attend(seen, positions=None):
    q = jax.random.normal(jax.random.key(9), (B, 1, N, H))
    return dot_product_attention(
        q,
        seen.k_BSKH,
        seen.v_BSKH,
        q_positions_BT=jnp.full((B, 1), S, jnp.int32),
        kv_positions_BS=seen.positions_BS if positions is None else positions,
        k_scale_BSK=seen.k_scale_BSK,
        v_scale_BSK=seen.v_scale_BSK,
    )


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_int8_is_within_half_a_step(size):
    """A step is max|x| / 127 of its token and head."""
    x = size * jax.random.normal(jax.random.key(0), (B, K, S, H))
    q, scale = slots.quantise(x)
    assert q.dtype == jnp.int8 and scale.dtype == jnp.float32
    error = np.abs(np.asarray(q, np.float64) * np.asarray(scale)[..., None] - np.asarray(x))
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (error <= step / 2 * (1 + 1e-4)).all()
    assert error.max() > 0.2 * step.min()


def test_int8_of_zeros_is_zero():
    q, scale = slots.quantise(jnp.zeros((1, 1, 2, H)))
    assert not q.any() and np.isfinite(scale).all()


def test_scales_are_applied_to_logits_and_weights():
    """Attention over int8 equals attention over what it stands for."""
    held, _, _ = filled(scale=3.0)
    seen = held.stored_as("int8").view()
    meant = dataclasses.replace(
        seen,
        k_BSKH=seen.k_BSKH * seen.k_scale_BSK[..., None],
        v_BSKH=seen.v_BSKH * seen.v_scale_BSK[..., None],
        k_scale_BSK=None,
        v_scale_BSK=None,
    )
    np.testing.assert_allclose(attend(seen), attend(meant), atol=1e-5)
    # And is near, yet not equal to, attention over floats.
    apart = np.abs(attend(seen) - attend(held.view())).max()
    assert 1e-4 < apart < 0.15
    # The same without positions, where other implementations would pass over the scales.
    held = (seen.k_BSKH, seen.v_BSKH)
    scales = {"k_scale_BSK": seen.k_scale_BSK, "v_scale_BSK": seen.v_scale_BSK}
    q_BSNH = jax.random.normal(jax.random.key(9), (B, S, N, H))
    floats = dot_product_attention(q_BSNH, meant.k_BSKH, meant.v_BSKH, causal=False)
    ints = dot_product_attention(q_BSNH, *held, causal=False, **scales)
    np.testing.assert_allclose(ints, floats, atol=1e-5)
    with pytest.raises(ValueError, match="'blocked' does not support scales of keys and values"):
        dot_product_attention(q_BSNH, *held, implementation="blocked", **scales)


def test_a_token_put_into_int8_slots_is_quantised_like_the_others():
    held, k, v = filled()
    at_once = held.stored_as("int8")
    empty = slots.empty((B, K, S, H), "float32")
    step = empty.stored_as("int8")
    for t in range(S):
        step = step.put(k[:, t : t + 1], v[:, t : t + 1], jnp.full((B, 1), t))
    jax.tree.map(np.testing.assert_array_equal, step, at_once)


def test_bytes_of_int8_are_a_quarter_and_scales():
    held, _, _ = filled()
    size = lambda x: sum(leaf.nbytes for leaf in jax.tree.leaves((x.k_BKSH, x.v_BKSH)))  # noqa: E731
    small = held.stored_as("int8")
    assert size(small) * 4 == size(held)
    assert small.k_scale_BKS.nbytes + small.v_scale_BKS.nbytes == 2 * 4 * B * K * S


def test_a_ring_overwrites_its_oldest_and_leaves_what_is_before_it():
    held, _, _ = filled()
    ring = dataclasses.replace(held, ring=2, at=jnp.asarray(2, jnp.int32))
    token = jnp.ones((B, 1, K, H))
    for position in range(6, 11):
        ring = ring.put(token, token, jnp.full((B, 1), position))
    np.testing.assert_array_equal(ring.positions_BXS[0, 0], [0, 1, 10, 7, 8, 9])
    with pytest.raises(ValueError, match="one token at a time"):
        ring.put(jnp.ones((B, 2, K, H)), jnp.ones((B, 2, K, H)), jnp.zeros((B, 2)))


def test_tokens_beyond_the_empty_slots_are_refused_where_their_number_is_known():
    """Outside of compiled code it is; inside, tokens beyond all slots are known."""
    held, k, _ = filled()
    one, at = k[:, :1], jnp.full((B, 1), S)
    held.with_room(1).put(one, one, at)
    with pytest.raises(ValueError, match="6 slots with 0 empty ones takes no 1 tokens more"):
        held.put(one, one, at)
    more = jnp.ones((B, S + 1, K, H))
    with pytest.raises(ValueError, match="takes no 7 tokens more"):
        jax.eval_shape(lambda held: held.put(more, more, jnp.zeros((B, S + 1))), held)


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_may_see_different_slots_of_one_store(heads):
    """Positions [B, X, S] over one key/value head: as attending head by head to its own slots."""
    k, v = (jax.random.normal(key, (B, S, 1, H)) for key in jax.random.split(jax.random.key(1)))
    owner_S = jnp.arange(S) % heads
    at = jnp.where(owner_S[None] == jnp.arange(heads)[:, None], jnp.arange(S)[None], -1)
    q = jax.random.normal(jax.random.key(2), (B, 1, N, H))
    where = {"q_positions_BT": jnp.full((B, 1), S)}
    got = dot_product_attention(
        q, k, v, kv_positions_BS=jnp.broadcast_to(at, (B, heads, S)), **where
    )
    for n in range(N):
        own = np.flatnonzero(owner_S == n // (N // heads))
        want = dot_product_attention(
            q[:, :, n : n + 1],
            k[:, own],
            v[:, own],
            kv_positions_BS=jnp.broadcast_to(own, (B, len(own))),
            **where,
        )
        np.testing.assert_allclose(got[:, :, n : n + 1], want, atol=1e-5)


def test_order_of_slots_does_not_matter():
    """5: permuting slots with their positions leaves attention unchanged."""
    held, _, _ = filled()
    order = jnp.stack(
        [jax.random.permutation(key, S) for key in jax.random.split(jax.random.key(0), B)]
    )
    shuffled = held.take(order[:, None])
    np.testing.assert_allclose(attend(shuffled.view()), attend(held.view()), atol=1e-5)
    assert (shuffled.k_BKSH != held.k_BKSH).any()


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_a_dtype_that_is_no_number_format_of_a_cache_is_named(dtype):
    with pytest.raises(ValueError, match=f"cache dtype = '{dtype}': use int8"):
        filled()[0].stored_as(dtype)
