"""Reading prompts into key/value caches: one pass over all of them.

Prompts of unequal length share a batch: they are padded on the right, where position -1 marks what
no token sees.

Shapes: B batch, T prompt length, D width, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from model.kv_cache.base import CachePolicy


def prefill(
    model: Any,
    params: Any,
    policy: CachePolicy,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    room: int,
) -> tuple[jax.Array, Any]:
    """Reads prompts of lengths_B >= 1 tokens.

    Returns:
      Logits [B, V] after the last token of each, and caches with room for `room` more tokens.
    """
    config = model.config
    B, T = tokens_BT.shape
    empty = [
        policy.init(
            batch=B,
            length=T,
            num_kv_heads=config.kv_heads,
            head_dim=config.per_head_dim,
            dtype=config.compute_dtype,
            layer=layer,
            kind=config.layer_kind(layer),
        )
        for layer in range(config.num_layers)
    ]
    at_T = jnp.arange(T, dtype=jnp.int32)[None]
    positions_BT = jnp.where(at_T < lengths_B[:, None], at_T, -1)
    # Segments say that there is nothing to see but the prompt (model/attention.py).
    segments_BT = (positions_BT >= 0).astype(jnp.int32)
    out = read(model, params, policy, tokens_BT, positions_BT, empty, segments_BT)
    last_B1D = jnp.take_along_axis(out.hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    caches = [policy.compress(cache, length=room) for cache in out.caches]
    return model.apply({"params": params}, last_B1D, method="logits")[:, 0], caches


def read(model, params, policy, tokens_BT, positions_BT, caches, segments_BT=None):
    """Hidden states of tokens and the caches after them, see `hidden` in model/transformer.py."""
    return model.apply(
        {"params": params},
        tokens_BT,
        positions_BT=positions_BT,
        segments_BT=segments_BT,
        caches=caches,
        policy=policy,
        method="hidden",
    )
