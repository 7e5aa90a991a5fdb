"""What queries look at, and how well a choice of positions foresees it (SnapKV, arXiv 2404.14469).

A hit rate asks how much of what generation attends to lies among chosen positions: with M_vote one at
the chosen and M_thr one where an attention weight exceeds a threshold, it is
sum(M_vote and M_thr) / sum(M_thr) (section 3 of the paper, which does not give the threshold).

Shapes: B prompts, Q queries, T keys, P positions of a prefix, C chosen ones, N query heads, K key/value
heads, X 1 or K, S slots, W windows, H head dim.
"""

import jax
import jax.numpy as jnp

from trainers.snapkv.replay import LayerRecord


def attention_weights(record: LayerRecord, at_BQ: jax.Array, prefix: int) -> jax.Array:
    """Weights [B, N, Q, P] of the queries at given positions on the first `prefix` keys, in float32.

    The softmax is over all keys up to the query, those after the prefix too. The first `prefix` tokens
    of every row are those of positions 0, 1, ...; padding may follow anywhere after them.
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
    """True at the `count` positions of most votes of every head."""
    index_BNC = jax.lax.top_k(votes_BNP, count)[1]
    return jax.nn.one_hot(index_BNC, votes_BNP.shape[-1], dtype=bool).any(-2)


def hits(chosen_BNP: jax.Array, weights_BNQP: jax.Array, threshold: float) -> jax.Array:
    """(hits, attended) of each prompt, [B, 2]: the hit rate is the ratio of their sums."""
    attended_BNQP = weights_BNQP > threshold
    hit_BNQP = attended_BNQP & chosen_BNP[:, :, None]
    return jnp.stack([hit_BNQP.sum((1, 2, 3)), attended_BNQP.sum((1, 2, 3))], axis=-1)


def overlap(one_BNP: jax.Array, other_BNP: jax.Array) -> jax.Array:
    """Share of the positions of one choice that are in the other, [B], over all heads.

    Of two choices of equal size it is the same from both sides.
    """
    shared_B = (one_BNP & other_BNP).sum((1, 2))
    return shared_B / jnp.maximum(one_BNP.sum((1, 2)), 1)


def held_positions(positions_BXS: jax.Array, prefix: int) -> jax.Array:
    """True [B, X, P] at the positions below `prefix` that a cache holds."""
    index_BXS = jnp.where(positions_BXS < prefix, positions_BXS, -1)  # -1 is no class: all zeros
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
    """(hits, attended) [W, B, 2] of the choices of a prompt's last windows; the last window is last.

    All windows choose `count` of the first `prefix` positions by the summed weights of their queries,
    without pooling. What matters is what the queries of generated tokens attend to.

    Args:
      record: of prompts with what was generated after them.
      ends_B: tokens of each prompt; all windows must lie after the prefix.
      windows: how many.
      window: queries of each.
      answer: queries after the prompt. The first token is chosen from the prompt as it was read; they
        make the second and later ones.
      prefix, count, threshold: see above.
    """
    later_BQ = ends_B[:, None] + jnp.arange(answer)[None]
    later_BNQP = attention_weights(record, later_BQ, prefix)
    found = []
    for back in range(windows, 0, -1):
        at_BQ = ends_B[:, None] - back * window + jnp.arange(window)[None]
        votes_BNP = attention_weights(record, at_BQ, prefix).sum(2)
        found.append(hits(top_positions(votes_BNP, count), later_BNQP, threshold))
    return jnp.stack(found)
