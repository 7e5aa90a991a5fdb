"""Generation: one compiled loop over new tokens, after the prompts have been read (trainers/prefill.py).

A pure function of static shapes, which trainers/decoder.py compiles.

Shapes: B batch, M new tokens at most, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model.kv_cache.base import CachePolicy
from trainers.prefill import read
from trainers.sampling import Sampling, sample

NO_EOS = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a generation program is compiled for.

    Attributes:
      max_new_tokens: M.
      sampling: choice of the next token.
      eos_ids: tokens that end a row; the one that does counts as its last.
      eos_id: one more of them; NO_EOS for none.
      num_ids: size of the vocabulary; ids from there on are padding of the model's table and are
        never chosen. None for all rows of the table.
    """

    max_new_tokens: int = 128
    sampling: Sampling = Sampling(temperature=0.0)
    eos_ids: Sequence[int] = ()
    eos_id: int = NO_EOS
    num_ids: int | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens} must be at least 1.")


@flax.struct.dataclass
class Decoded:
    """New tokens, and the model's log-probability of each (before temperature and restrictions).

    Row b holds lengths_B[b] of them, EOS included; zeros follow.
    """

    tokens_BM: jax.Array
    log_probs_BM: jax.Array
    lengths_B: jax.Array


@flax.struct.dataclass
class _Loop:
    step: jax.Array
    done_B: jax.Array
    decoded: Decoded
    caches: Any


def decode(
    model: Any,
    params: Any,
    policy: CachePolicy,
    logits_BV: jax.Array,
    caches: Any,
    lengths_B: jax.Array,
    active_B: jax.Array,
    keys_B: jax.Array,
    settings: Settings,
) -> tuple[Decoded, Any]:
    """Continues prefilled prompts until every active row has ended or has M new tokens.

    Args:
      model: with unrolled layers.
      params: its parameters.
      policy: of the caches.
      logits_BV: after the prompts.
      caches: with room for M - 1 more tokens, for the last new one is never read.
      lengths_B: of the prompts.
      active_B: False for rows that only fill up the batch.
      keys_B: a random key for each row.
      settings: static.

    Returns:
      The new tokens, and the caches, so that their memory can be the given ones'.
    """
    B, M = logits_BV.shape[0], settings.max_new_tokens
    loop = _Loop(
        step=jnp.zeros((), jnp.int32),
        done_B=~active_B,
        decoded=Decoded(
            tokens_BM=jnp.zeros((B, M), jnp.int32),
            log_probs_BM=jnp.zeros((B, M), jnp.float32),
            lengths_B=jnp.zeros(B, jnp.int32),
        ),
        caches=caches,
    )
    loop = _choose(loop, logits_BV, keys_B, settings)

    def body(loop: _Loop) -> _Loop:
        last = loop.step - 1
        token_B1 = jax.lax.dynamic_slice_in_dim(loop.decoded.tokens_BM, last, 1, axis=1)
        # What an ended row would still add is marked as padding.
        position_B1 = jnp.where(loop.done_B, -1, lengths_B + last)[:, None]
        out = read(model, params, policy, token_B1, position_B1, loop.caches)
        logits_BV = model.apply({"params": params}, out.hidden_BTD, method="logits")[:, 0]
        return _choose(dataclasses.replace(loop, caches=out.caches), logits_BV, keys_B, settings)

    more = lambda loop: (loop.step < M) & ~jnp.all(loop.done_B)  # noqa: E731
    loop = jax.lax.while_loop(more, body, loop)
    return loop.decoded, loop.caches


def _choose(loop: _Loop, logits_BV: jax.Array, keys_B: jax.Array, settings: Settings) -> _Loop:
    """Adds token number `loop.step` to the rows that have not ended."""
    logp_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))
    if settings.num_ids is not None:
        known_V = jnp.arange(logits_BV.shape[-1]) < settings.num_ids
        logits_BV = jnp.where(known_V[None], logits_BV, -jnp.inf)
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, loop.step)
    token_B = sample(logits_BV, step_keys_B, settings.sampling)
    logp_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=1)[:, 0]
    ends_B = jnp.isin(token_B, jnp.asarray([*settings.eos_ids, settings.eos_id], jnp.int32))
    old, done_B = loop.decoded, loop.done_B

    def put(array_BM: jax.Array, value_B: jax.Array) -> jax.Array:
        value_B1 = jnp.where(done_B, 0, value_B).astype(array_BM.dtype)[:, None]
        return jax.lax.dynamic_update_slice_in_dim(array_BM, value_B1, loop.step, axis=1)

    return dataclasses.replace(
        loop,
        step=loop.step + 1,
        done_B=done_B | ends_B,
        decoded=Decoded(
            tokens_BM=put(old.tokens_BM, token_B),
            log_probs_BM=put(old.log_probs_BM, logp_B),
            lengths_B=old.lengths_B + (~done_B).astype(jnp.int32),
        ),
    )
