"""The attention of the retrieval model while it answers, and how well the prompt's last window predicts it.

Shapes: E prompts, T prompt length, P positions of a prefix, N query heads, L layers, W windows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.snapkv import retrieval
from launch.papers.snapkv.accuracy import SNAPKV, WINDOW, Retriever
from trainers.snapkv import cache_analysis, replay

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
            cache_analysis.window_hits,
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
    votes_ENP = cache_analysis.attention_weights(record, last_EQ, prefix).sum(2)
    chosen_ENP = cache_analysis.top_positions(votes_ENP, count)
    answer_EQ = ends_E[:, None] + jnp.arange(later)[None]
    weights_ENQP = cache_analysis.attention_weights(record, answer_EQ, prefix)
    each = [weights_ENQP[:, :, at : at + 1] for at in range(later)]
    return jnp.stack([cache_analysis.hits(chosen_ENP, one, THRESHOLD).sum(0) for one in each])


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
        return [cache_analysis.held_positions(at_EXS, prefix) for at_EXS in views]

    first, again, different = kept(asked_E), kept(asked_E), kept(other_E)
    shares = {
        name: [
            float(cache_analysis.overlap(*pair).mean()) for pair in zip(first, other, strict=True)
        ]
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
        held_EKP = cache_analysis.held_positions(policy.view(cache).positions_BS, length)
        group = shown.q_BTNH.shape[2] // held_EKP.shape[1]
        later_EQ = jnp.full((prompts, 1), length) + jnp.arange(retrieval.ANSWER_TOKENS - 1)[None]
        later_ENQP = cache_analysis.attention_weights(shown, later_EQ, length)
        held_ENP = jnp.repeat(held_EKP, group, axis=1)
        hits_E2 = cache_analysis.hits(held_ENP, later_ENQP, THRESHOLD)
        out.append(np.asarray(hits_E2.sum(0)).tolist())
    return out
