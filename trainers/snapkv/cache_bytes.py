"""Bytes of prompts' caches, calculated from the shapes of their states.

Shapes: T prompt length.
"""

from typing import Any

import jax
import jax.numpy as jnp

from espalier.model.kv_cache.base import CachePolicy
from espalier.trainers.snapkv import replay


def cache_bytes(
    model: Any,
    params: Any,
    policy: CachePolicy,
    *,
    length: int,
    room: int,
    batch: int = 1,
    depth: int = 1,
) -> dict[str, int]:
    """Returns the bytes of the caches of prompts, for `depth` times as many layers.

    Args:
      model: a model with unrolled layers.
      params: its parameters, or their shapes.
      policy: of the caches.
      length, batch: tokens of a prompt, and number of prompts.
      room: further tokens that the caches can hold.
      depth: see above.

    Returns:
      {"decode": bytes of all layers after the prompt, "peak": the most that is held at any time}. While the prompt is
      read, only the current layer's cache is uncompressed (trainers/decoding/prefill.py).
    """
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    recording = jax.eval_shape(
        lambda params, tokens, lengths: replay.record(model, params, tokens, lengths),
        *(params, tokens, lengths),
    )
    states = jax.eval_shape(
        lambda seen: replay.compressed(model, policy, seen, room=room), recording
    )
    compressed = [_size(state) for state in states] * depth
    whole = [_size((seen.k_BTKH, seen.v_BTKH)) for seen in recording.layers] * depth
    peak = max(
        max(w, k) + sum(compressed[:i])
        for i, (w, k) in enumerate(zip(whole, compressed, strict=True))
    )
    return {"decode": sum(compressed), "peak": max(peak, sum(compressed))}


def longest_prompt(
    model: Any, params: Any, policy: CachePolicy, *, limit: int, shortest: int, **sizes: int
) -> int:
    """Returns the number of tokens of the longest prompts whose caches stay within `limit` bytes.

    Args:
      model, params, policy: as of `cache_bytes`.
      limit: bytes.
      shortest: a number of tokens that fits.
      **sizes: `room`, `batch` and `depth` of `cache_bytes`.
    """
    low, high = shortest, 2**24
    while low + 1 < high:
        middle = (low + high) // 2
        peak = cache_bytes(model, params, policy, length=middle, **sizes)["peak"]
        low, high = (middle, high) if peak <= limit else (low, middle)
    return low


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
