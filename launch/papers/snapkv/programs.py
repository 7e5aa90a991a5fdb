"""The compiled programs that the measurements share; models of one shape share them too.

Shapes: B rows, T tokens, X tokens read after the compression.
"""

import functools

import jax
import jax.numpy as jnp

from trainers.snapkv import replay


@functools.partial(jax.jit, static_argnums=0)
def record(model, params, tokens_BT, lengths_B):
    return replay.record(model, params, tokens_BT, lengths_B)


@functools.partial(jax.jit, static_argnums=0)
def record_more(model, params, recording, tokens_BX, counts_B):
    return replay.record_more(model, params, recording, tokens_BX, counts_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def compress(model, policy, room, cache_dtype, recording):
    return replay.compressed(model, policy, recording, room=room, cache_dtype=cache_dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_on(model, policy, params, caches, lengths_B, tokens_BX, counts_B=None):
    """Reads tokens after the compression, all of them where there are no counts."""
    if counts_B is None:
        counts_B = jnp.full(len(tokens_BX), tokens_BX.shape[1], jnp.int32)
    return replay.read_on(model, params, policy, caches, lengths_B, tokens_BX, counts_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def answer(model, policy, settings, params, caches, lengths_B, logits_BV):
    """Returns the generated tokens."""
    output = replay.answer(model, params, policy, caches, lengths_B, logits_BV, settings)
    return output.tokens_BM
