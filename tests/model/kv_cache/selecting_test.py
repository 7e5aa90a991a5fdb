"""Scores of keys against NumPy in float64.

Numbers in docstrings are those of the invariants of SnapKV that the project holds itself to.

Shapes: B batch, T queries, W the last of them, S slots, N query heads, K key/value heads, G = N / K,
H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.kv_cache import selecting, slots
from espalier.model.kv_cache.base import AttentionForm

B, S, N, K, H = 2, 14, 4, 2, 4
FORMS = [
    AttentionForm(scale=0.7),
    AttentionForm(scale=0.7, window=5),
    AttentionForm(scale=0.7, softcap=1.5),
]


def draw(seed=0, heads=N):
    """Queries, keys and values of S tokens, and positions: padding after the second row's first 9."""
    q, k, v = (
        jax.random.normal(key, (B, S, n, H))
        for key, n in zip(jax.random.split(jax.random.key(seed), 3), (heads, K, K), strict=True)
    )
    at = np.arange(S)[None]
    return q, k, v, jnp.asarray(np.where(at < np.array([[S], [9]]), at, -1), jnp.int32)


def held(k, v, positions):
    empty = slots.empty((B, K, S, H), k.dtype)
    return empty.put(k, v, positions)


def softmax_rows(q_WNH, k_SKH, at_W, at_S, form):
    """Attention weights [N, W, S] of one row in float64; rows of zeros where nothing is seen."""
    q, k = np.asarray(q_WNH, np.float64), np.asarray(k_SKH, np.float64)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    logits = form.scale * np.einsum("wnh,snh->nws", q, k)
    if form.softcap:
        logits = form.softcap * np.tanh(logits / form.softcap)
    at_W, at_S = np.asarray(at_W)[:, None], np.asarray(at_S)[None]
    seen = (at_S >= 0) & (at_S <= at_W) & (at_S > at_W - (form.window or 10**9))
    weights = np.where(seen, np.exp(logits), 0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


@pytest.mark.parametrize("form", FORMS)
def test_votes_are_the_attention_that_a_float64_softmax_gives(form):
    """12: and 9: a row's votes are as many as its real queries, whatever lies in the window."""
    q, k, v, at = draw()
    got = selecting.votes(q, at, held(k, v, at), form)
    for b, real in enumerate((S, 9)):
        want = softmax_rows(q[b], k[b], at[b], at[b], form).sum(1)
        np.testing.assert_allclose(got[b].reshape(N, S), want, atol=1e-5)
        np.testing.assert_allclose(got[b].sum(-1), real, atol=1e-4)


def test_votes_of_bfloat16_are_near():
    """12, in bfloat16: products are summed in float32, so only the inputs are coarser."""
    q, k, v, at = draw()
    q, k = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    got = selecting.votes(q, at, held(k, v.astype(k.dtype), at), FORMS[0])
    assert got.dtype == jnp.float32
    want = softmax_rows(q[0], k[0], at[0], at[0], FORMS[0]).sum(1)
    np.testing.assert_allclose(got[0].reshape(N, S), want, atol=1e-2)


def test_votes_in_blocks_are_the_votes_at_once(monkeypatch):
    q, k, v, at = draw()
    monkeypatch.setattr(selecting, "_BLOCK", q.shape[1])
    want = selecting.votes(q, at, held(k, v, at), FORMS[1])
    monkeypatch.setattr(selecting, "_BLOCK", 5)  # the last block is not full
    got = selecting.votes(q, at, held(k, v, at), FORMS[1])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_as_many_key_value_heads_as_queries_is_multi_head_attention():
    """8: and identical heads in a group vote alike under mean and max."""
    q, k, v, at = draw()
    per_head = selecting.votes(q, at, held(k, v, at), FORMS[0])
    repeated = [jnp.repeat(x, N // K, axis=2) for x in (k, v)]
    empty = slots.empty((B, N, S, H), k.dtype)
    alone = selecting.votes(q, at, empty.put(*repeated, at), FORMS[0])
    np.testing.assert_allclose(
        selecting.of_group(alone, "mean"), per_head.reshape(B, N, S), atol=1e-6
    )
    same = jnp.repeat(q[:, :, ::2], 2, axis=2)
    votes = selecting.votes(same, at, held(k, v, at), FORMS[0])
    mean, most = (selecting.of_group(votes, how) for how in ("mean", "max"))
    np.testing.assert_allclose(mean, most, atol=1e-6)
    np.testing.assert_array_equal(selecting.best(mean, 5), selecting.best(most, 5))
    assert (
        np.abs(selecting.of_group(per_head, "mean") - selecting.of_group(per_head, "max")).max()
        > 0.1
    )


def test_pooling_by_hand():
    """A maximum is of what is there; an average divides by the whole kernel also at the edges."""
    votes = jnp.array([[[4.0, 1.0, 0.0, 2.0, 9.0, 5.0]]])
    eligible = jnp.array([[True, True, True, True, False, False]])
    most = selecting.pooled(votes, eligible, 3, "max")[0, 0, :4]
    np.testing.assert_array_equal(most, [4, 4, 2, 2])
    mean = selecting.pooled(votes, eligible, 3, "average")[0, 0, :4]
    np.testing.assert_allclose(mean, np.array([5, 5, 3, 2]) / 3, rtol=1e-6)


def test_a_kernel_of_one_changes_nothing():
    """6: plain top-n, by maximum and by average alike."""
    votes = jax.random.uniform(jax.random.key(0), (B, K, S))
    everything = jnp.ones((B, S), bool)
    for pooling in ("max", "average"):
        np.testing.assert_array_equal(selecting.pooled(votes, everything, 1, pooling), votes)
    order = np.sort(np.argsort(-np.asarray(votes), axis=-1)[..., :4], axis=-1)
    np.testing.assert_array_equal(selecting.best(votes, 4), order)


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_a_spike_lifts_its_neighbours_alike(kernel):
    """7: j +- kernel // 2 score as j does, and a budget of the kernel keeps them all."""
    spike = jnp.zeros((1, 1, S)).at[0, 0, 6].set(1.0)
    pooled = selecting.pooled(spike, jnp.ones((1, S), bool), kernel, "max")
    near = np.abs(np.arange(S) - 6) <= kernel // 2
    np.testing.assert_array_equal(pooled[0, 0], near.astype(np.float32))
    np.testing.assert_array_equal(selecting.best(pooled, kernel)[0, 0], np.flatnonzero(near))


def test_recent_and_empty_slots_bound_the_ranking():
    at = jnp.array([[0, 1, 2, 3, -1], [-1, 0, 1, 2, 3]])
    ranked = selecting.ranked(jnp.ones((2, 1, 5)), at, 2)
    inf = np.inf
    np.testing.assert_array_equal(ranked[0, 0], [1, 1, inf, inf, -inf])
    np.testing.assert_array_equal(ranked[1, 0], [-inf, 1, 1, inf, inf])
