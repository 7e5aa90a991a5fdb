"""Scores of keys by the attention of some queries: pure functions in float32.

Shapes: B batch, T queries, W observed queries, S slots, C slots chosen, N query heads, K key/value
heads, G = N / K, X heads that choose their own slots, H head dim.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from espalier.model.kernels.attention_ops import received_attention
from espalier.model.kv_cache.base import AttentionForm
from espalier.model.kv_cache.slots import Slots

Pooling = Literal["max", "average"]
GroupVote = Literal["mean", "max"]

# Number of queries whose attention weights are in memory at a time. With few queries the weights stay in a
# CPU's caches: of 8, 16 and 32 this is the fastest at 16,384 keys, and 64 take several times as long.
_BLOCK = 16


def votes(
    q_BTNH: jax.Array, positions_BT: jax.Array, held: Slots, form: AttentionForm
) -> jax.Array:
    """Returns the attention [B, K, G, S] that each slot receives, summed over the queries.

    The weights are the layer's attention weights: a softmax over all keys that a query sees. The sum is
    computed for some queries at a time. Queries at position -1 do not count.
    """

    def received(q_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        seen = held.view()  # inside the loop: outside it the transposition would be a copy
        return received_attention(
            q_BTNH,
            seen.k_BSKH,
            q_positions_BT=positions_BT,
            kv_positions_BS=seen.positions_BS,
            **form.arguments(),
        )

    B, T, N, _ = q_BTNH.shape
    blocks = -(-T // _BLOCK)
    if blocks == 1:
        return received(q_BTNH, positions_BT)
    more = blocks * _BLOCK - T
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, more), (0, 0), (0, 0)))
    positions_BT = jnp.pad(positions_BT, ((0, 0), (0, more)), constant_values=-1)

    def add(i: jax.Array, total_BKGS: jax.Array) -> jax.Array:
        q_BUNH, positions_BU = (
            jax.lax.dynamic_slice_in_dim(x, i * _BLOCK, _BLOCK, axis=1)
            for x in (q_BTNH, positions_BT)
        )
        return total_BKGS + received(q_BUNH, positions_BU)

    K, S = held.k_BKSH.shape[1:3]
    return jax.lax.fori_loop(0, blocks, add, jnp.zeros((B, K, N // K, S), jnp.float32))


def of_group(votes_BKGS: jax.Array, group_vote: GroupVote) -> jax.Array:
    """Returns one vote [B, K, S] per key/value head, from the query heads that share it."""
    return votes_BKGS.mean(2) if group_vote == "mean" else votes_BKGS.max(2)


def pooled(
    votes_BXS: jax.Array, eligible_BS: jax.Array, kernel: int, pooling: Pooling
) -> jax.Array:
    """Pools votes along slots with stride 1, so that neighbouring tokens are kept together.

    Ineligible slots do not raise their neighbours' votes: they count as -inf in a maximum and as zero in
    an average. An average divides by the kernel size also at the edges (arXiv 2404.14469, listing 1). The
    results at ineligible slots are undefined.
    """
    outside = -jnp.inf if pooling == "max" else 0.0
    combine = jax.lax.max if pooling == "max" else jax.lax.add
    inside_BXS = jnp.where(eligible_BS[:, None], votes_BXS, outside)
    half = kernel // 2
    out_BXS = jax.lax.reduce_window(
        inside_BXS,
        jnp.asarray(outside, votes_BXS.dtype),
        combine,
        window_dimensions=(1, 1, kernel),
        window_strides=(1, 1, 1),
        padding=((0, 0), (0, 0), (half, half)),
    )
    return out_BXS if pooling == "max" else out_BXS / kernel


def recent(positions_BS: jax.Array, window: int) -> jax.Array:
    """Returns True [B, S] for the last `window` tokens of every row."""
    last_B1 = positions_BS.max(1, keepdims=True)
    return (positions_BS >= 0) & (positions_BS > last_B1 - window)


def ranked(scores_BXS: jax.Array, positions_BS: jax.Array, window: int) -> jax.Array:
    """Returns scores that rank the last `window` tokens of a row first and empty slots last."""
    recent_BS, real_BS = recent(positions_BS, window), positions_BS >= 0
    scores_BXS = jnp.where(recent_BS[:, None], jnp.inf, scores_BXS)
    return jnp.where(real_BS[:, None], scores_BXS, -jnp.inf)


def best(scores_BXS: jax.Array, count: int) -> jax.Array:
    """Returns the indices [B, X, C] of the `count` highest scores, ascending; ties go to the first."""
    return jnp.sort(jax.lax.top_k(scores_BXS, count)[1], axis=-1)
