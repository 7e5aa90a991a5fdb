"""Attention of queries, and how well a choice of positions predicts it (SnapKV, arXiv 2404.14469).

The hit rate is the share of large attention weights of generated tokens that is at chosen positions. It is
sum(M_vote and M_thr) / sum(M_thr), where M_vote is 1 at the chosen positions and M_thr is 1 where an
attention weight exceeds a threshold (section 3 of the paper, which does not state the threshold).

Shapes: B prompts, Q queries, T keys, P positions of a prefix, C chosen ones, N query heads, K key/value
heads, X 1 or K, S slots, W windows, H head dim.
"""

import jax
import jax.numpy as jnp

from trainers.snapkv.replay import LayerRecord


def attention_weights(record: LayerRecord, at_BQ: jax.Array, prefix: int) -> jax.Array:
    """Returns the attention weights [B, N, Q, P], float32, of queries at `at_BQ` on the first `prefix` keys.

    The softmax is over all keys up to the query, including keys after the prefix. The first `prefix`
    tokens of every row must have the positions 0, 1, ...; padding may be anywhere after them.
    """
    index_BQ = (record.positions_BT[:, None] == at_BQ[..., None]).argmax(-1)
    q_BQNH = jnp.take_along_axis(record.q_BTNH, index_BQ[..., None, None], axis=1)
    B, Q, N, H = q_BQNH.shape
    K = record.k_BTKH.shape[2]
    logits = record.form.scale * jnp.einsum(
        "bqkgh,btkh->bkgqt",
        q_BQNH.reshape(B, Q, K, N // K, H),
        record.k_BTKH,
        preferred_element_type=jnp.float32,
    )
    if record.form.softcap is not None:
        logits = record.form.softcap * jnp.tanh(logits / record.form.softcap)
    key_B1T, at_BQ1 = record.positions_BT[:, None], at_BQ[..., None]
    seen_BQT = (key_B1T >= 0) & (key_B1T <= at_BQ1)
    if record.form.window is not None:
        seen_BQT &= key_B1T > at_BQ1 - record.form.window
    weights = jax.nn.softmax(jnp.where(seen_BQT[:, None, None], logits, -jnp.inf), axis=-1)
    return weights.reshape(B, N, Q, -1)[..., :prefix]


def top_positions(votes_BNP: jax.Array, count: int) -> jax.Array:
    """Returns True at the `count` positions with the most votes, for every head."""
    index_BNC = jax.lax.top_k(votes_BNP, count)[1]
    return jax.nn.one_hot(index_BNC, votes_BNP.shape[-1], dtype=bool).any(-2)


def hits(chosen_BNP: jax.Array, weights_BNQP: jax.Array, threshold: float) -> jax.Array:
    """Returns (hits, attended) of each prompt, [B, 2]; the hit rate is the ratio of their sums."""
    attended_BNQP = weights_BNQP > threshold
    hit_BNQP = attended_BNQP & chosen_BNP[:, :, None]
    return jnp.stack([hit_BNQP.sum((1, 2, 3)), attended_BNQP.sum((1, 2, 3))], axis=-1)


def overlap(first_BNP: jax.Array, second_BNP: jax.Array) -> jax.Array:
    """Returns the share of positions of the first choice that are also in the second, [B], over all heads.

    It is symmetric if both choices have the same size.
    """
    shared_B = (first_BNP & second_BNP).sum((1, 2))
    return shared_B / jnp.maximum(first_BNP.sum((1, 2)), 1)


def held_positions(positions_BXS: jax.Array, prefix: int) -> jax.Array:
    """Returns True [B, X, P] at the positions below `prefix` that are in a cache."""
    index_BXS = jnp.where(positions_BXS < prefix, positions_BXS, -1)  # one_hot of -1 is all zeros
    return jax.nn.one_hot(index_BXS, prefix, dtype=bool).any(-2)


def window_hits(
    record: LayerRecord,
    ends_B: jax.Array,
    *,
    windows: int,
    window: int,
    answer: int,
    prefix: int,
    count: int,
    threshold: float,
) -> jax.Array:
    """Returns (hits, attended) [W, B, 2] of the choices of a prompt's last W windows, in order.

    Each window chooses `count` of the first `prefix` positions by the summed weights of its queries,
    without pooling. The choices are compared with the attention of the generated tokens.

    Args:
      record: record of prompts and the tokens generated after them.
      ends_B: number of tokens of each prompt; all windows must be after the prefix.
      windows: number of windows, W.
      window: number of queries per window.
      answer: number of queries after the prompt. They generate the second and later new tokens; the
        first new token is generated from the prompt's last query.
      prefix, count, threshold: see above.
    """
    answer_BQ = ends_B[:, None] + jnp.arange(answer)[None]
    answer_BNQP = attention_weights(record, answer_BQ, prefix)
    counts = []
    for back in range(windows, 0, -1):
        at_BQ = ends_B[:, None] - back * window + jnp.arange(window)[None]
        votes_BNP = attention_weights(record, at_BQ, prefix).sum(2)
        counts.append(hits(top_positions(votes_BNP, count), answer_BNQP, threshold))
    return jnp.stack(counts)
