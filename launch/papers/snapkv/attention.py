"""The attention of models while they answer, and how well a choice of positions predicts it (SnapKV, arXiv 2404.14469).

The hit rate is the share of large attention weights of generated tokens that is at chosen positions, such as those that the
prompt's last window chooses. It is sum(M_vote and M_thr) / sum(M_thr), where M_vote is 1 at the chosen positions and M_thr is 1 where an
attention weight exceeds a threshold (section 3 of the paper, which does not state the threshold).

Shapes: B or E prompts, Q queries, T keys or prompt length, P positions of a prefix, C chosen ones, N query heads, K key/value
heads, X 1 or K, L layers, S slots, W windows, H head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.launch.papers.snapkv import retrieval
from espalier.launch.papers.snapkv.accuracy import SNAPKV, WINDOW, Retriever
from espalier.trainers.snapkv import replay
from espalier.trainers.snapkv.replay import LayerRecord


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


def hits_by_window(
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
      prefix: number of first positions that a window chooses from.
      count: number of positions that it chooses.
      threshold: attention weight above which a position is attended to.
    """
    answer_BQ = ends_B[:, None] + jnp.arange(answer)[None]
    answer_BNQP = attention_weights(record, answer_BQ, prefix)
    counts = []
    for back in range(windows, 0, -1):
        at_BQ = ends_B[:, None] - back * window + jnp.arange(window)[None]
        votes_BNP = attention_weights(record, at_BQ, prefix).sum(2)
        counts.append(hits(top_positions(votes_BNP, count), answer_BNQP, threshold))
    return jnp.stack(counts)


CHOSEN_SHARE = 0.1  # of the prefix that a window's votes choose
THRESHOLD = 0.05  # of attention weights that count
WINDOWS = 16


def hit_rates(
    retriever: Retriever,
    *,
    prompts: int,
    lines: int,
    question: retrieval.Question = "last",
    windows: int = WINDOWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the hit rates of the choices of the prompt's last windows, by layer.

    All windows choose among the positions before the first window, by the summed weights of their queries, without
    pooling. A hit is a weight above the threshold, of the queries that generate the second and later tokens with the
    full cache.

    Returns:
      {"hits": [L, W, 2] of (hits, attended) of all prompts, "tokens": [L, A - 1, 2] of the last window by generated token,
      "prefix": P, "chosen": count}; the last window is last.
    """
    drawn, _, _, read_on = retriever.draw(prompts, lines, seed, question)
    length = drawn.tokens_ET.shape[1]
    prefix = length - windows * WINDOW
    count = max(round(CHOSEN_SHARE * prefix), 1)
    ends_E = jnp.full(prompts, length, jnp.int32)
    later = retrieval.ANSWER_TOKENS - 1
    window_hits = jax.jit(
        functools.partial(
            hits_by_window,
            windows=windows,
            window=WINDOW,
            answer=later,
            prefix=prefix,
            count=count,
            threshold=THRESHOLD,
        )
    )
    by_layer = [window_hits(record, ends_E).sum(1) for record in read_on.layers]
    by_token = [_of_tokens(record, ends_E, later, prefix, count) for record in read_on.layers]
    return {
        "hits": np.asarray(by_layer).tolist(),
        "tokens": np.asarray(by_token).tolist(),
        "prefix": prefix,
        "chosen": count,
    }


def _of_tokens(record: Any, ends_E: jax.Array, later: int, prefix: int, count: int) -> jax.Array:
    """Returns (hits, attended) [A - 1, 2] of the last window's choices, by generated token."""
    last_EQ = ends_E[:, None] - WINDOW + jnp.arange(WINDOW)[None]
    votes_ENP = attention_weights(record, last_EQ, prefix).sum(2)
    chosen_ENP = top_positions(votes_ENP, count)
    answer_EQ = ends_E[:, None] + jnp.arange(later)[None]
    weights_ENQP = attention_weights(record, answer_EQ, prefix)
    each = [weights_ENQP[:, :, at : at + 1] for at in range(later)]
    return jnp.stack([hits(chosen_ENP, one, THRESHOLD).sum(0) for one in each])


def overlaps(
    retriever: Retriever, *, prompts: int, lines: int, capacity: int, seed: int = 0
) -> dict[str, Any]:
    """Measures the share of kept positions that two prompts with one context have in common, by layer.

    Two prompts of the same question differ in the answered example before it; two of different
    questions in both.

    Returns:
      {"same": [L], "different": [L], "chance": expected share of two random choices}: means over prompts.
    """
    rng = np.random.default_rng((seed, lines))
    context = retrieval.draw_lines(rng, prompts, lines)
    asked_E = rng.integers(lines, size=prompts)
    other_E = (asked_E + rng.integers(1, lines, size=prompts)) % lines
    policy = SNAPKV.at(capacity)
    prefix = 1 + lines * retrieval.LINE - (WINDOW - retrieval.LINE - 1)  # before every window

    def kept(asked_E: np.ndarray) -> list[jax.Array]:
        drawn = retrieval.draw_prompts(rng, context, asked_E=asked_E)
        recording = retriever.record(drawn.tokens_ET)
        caches = replay.compressed(retriever.model, policy, recording, room=1)
        views = [policy.view(cache).positions_BS for cache in caches]
        return [held_positions(at_EXS, prefix) for at_EXS in views]

    first, again, different = kept(asked_E), kept(asked_E), kept(other_E)
    shares = {
        name: [float(overlap(*pair).mean()) for pair in zip(first, other, strict=True)]
        for name, other in (("same", again), ("different", different))
    }
    chance = (capacity - WINDOW) / prefix
    return {**shares, "chance": chance}


def kept_hits(
    retriever: Retriever,
    *,
    prompts: int,
    lines: int,
    question: retrieval.Question,
    capacity: int,
    seed: int = 0,
) -> list[Any]:
    """Returns (hits, attended) [L, 2] of the positions that SnapKV keeps, its window included, while it answers."""
    drawn, recording, _, read_on = retriever.draw(prompts, lines, seed, question)
    length = drawn.tokens_ET.shape[1]
    policy = SNAPKV.at(capacity)
    out = []
    for cache, shown in zip(
        replay.compressed(retriever.model, policy, recording, room=1), read_on.layers, strict=True
    ):
        held_EKP = held_positions(policy.view(cache).positions_BS, length)
        group = shown.q_BTNH.shape[2] // held_EKP.shape[1]
        later_EQ = jnp.full((prompts, 1), length) + jnp.arange(retrieval.ANSWER_TOKENS - 1)[None]
        later_ENQP = attention_weights(shown, later_EQ, length)
        held_ENP = jnp.repeat(held_EKP, group, axis=1)
        hits_E2 = hits(held_ENP, later_ENQP, THRESHOLD)
        out.append(np.asarray(hits_E2.sum(0)).tolist())
    return out
