"""The attention of the retrieval model while it answers, and how well the prompt's last window predicts it.

Shapes: E prompts, T prompt length, P positions of a prefix, N query heads, L layers, W windows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.snapkv import retrieval
from launch.papers.snapkv.retrieval import SNAPKV, WINDOW, Retriever
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
      {"hits": [L, W, E, 2] of (hits, attended), "prefix": P, "chosen": count}; the last window is last.
    """
    drawn, _, _, read_on = retriever.draw(prompts, lines, seed, question)
    length = drawn.tokens_ET.shape[1]
    prefix = length - windows * WINDOW
    count = max(round(CHOSEN_SHARE * prefix), 1)
    ends_E = jnp.full(prompts, length, jnp.int32)
    window_hits = jax.jit(
        functools.partial(
            cache_analysis.window_hits,
            windows=windows,
            window=WINDOW,
            answer=retrieval.ANSWER_TOKENS - 1,
            prefix=prefix,
            count=count,
            threshold=THRESHOLD,
        )
    )
    by_layer = [window_hits(record, ends_E) for record in read_on.layers]
    return {"hits": np.asarray(by_layer).tolist(), "prefix": prefix, "chosen": count}


def overlaps(
    retriever: Retriever, *, prompts: int, lines: int, capacity: int, seed: int = 0
) -> dict[str, Any]:
    """Measures the share of kept positions that two prompts with one context have in common, by layer.

    Two prompts of the same question differ in the answered example before it; two of different
    questions in both.

    Returns:
      {"same": [L, E], "different": [L, E], "chance": expected share of two random choices}.
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
        name: np.stack([cache_analysis.overlap(*pair) for pair in zip(first, other, strict=True)])
        for name, other in (("same", again), ("different", different))
    }
    chance = (capacity - WINDOW) / prefix
    return {**{name: array.tolist() for name, array in shares.items()}, "chance": chance}


def kept_hits(
    retriever: Retriever,
    *,
    prompts: int,
    lines: int,
    question: retrieval.Question,
    capacity: int,
    seed: int = 0,
) -> list[Any]:
    """Returns (hits, attended) [L, E, 2] of the positions that SnapKV keeps, its window included, while it answers."""
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
        out.append(np.asarray(cache_analysis.hits(held_ENP, later_ENQP, THRESHOLD)).tolist())
    return out
