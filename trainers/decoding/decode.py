"""Generation: one compiled loop over new tokens, after the prompts have been read (trainers/decoding/prefill.py).

Pure functions of static shapes, which trainers/decoding/decoder.py compiles. `begin` chooses the first token;
`advance` continues until a step that is an argument, so that the host can read the tokens at any step without
compiling another program.

Shapes: B rows, M new tokens at most, D width, V vocabulary.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from espalier.model.kv_cache.base import CachePolicy
from espalier.model.kv_cache.slots import carried, restored
from espalier.trainers.decoding.prefill import read
from espalier.trainers.decoding.sampling import (
    RowSampling,
    only_among,
    penalised,
    sample,
    sample_rows,
    without_padding_ids,
)
from espalier.trainers.decoding.settings import Settings


@flax.struct.dataclass
class Decoded:
    """New tokens, and the model's log-probability of each (before temperature and restrictions).

    Row b has lengths_B[b] tokens, including EOS, followed by zeros.
    """

    tokens_BM: jax.Array
    log_probs_BM: jax.Array
    lengths_B: jax.Array


@flax.struct.dataclass
class Loop:
    """The state between steps: `step` tokens have been chosen; the last is not yet in the caches.

    Attributes:
      done_B: whether each row has ended.
      decoded: the tokens chosen so far.
      caches: caches of all tokens except the last chosen one.
      keys_B: a random key for each row.
      seen_BV: True for tokens of prompts and continuations; None without a repetition penalty.
    """

    step: jax.Array
    done_B: jax.Array
    decoded: Decoded
    caches: Any
    lengths_B: jax.Array
    keys_B: jax.Array
    seen_BV: jax.Array | None


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
    """Runs `begin` and `advance`; returns new tokens and caches.

    Raises:
      ValueError: settings with beams or a repetition penalty, which only `Decoder` has.
    """
    if settings.beams or settings.sampling.repetition_penalty != 1:
        raise ValueError(
            "These continuations are made without beams and without a repetition penalty: remove Settings.beams and "
            "Sampling.repetition_penalty."
        )
    loop = begin(logits_BV, caches, lengths_B, active_B, keys_B, None, settings)
    until = jnp.int32(settings.max_new_tokens)
    loop = advance(model, params, policy, loop, until, jnp.zeros_like(active_B), settings)
    return loop.decoded, loop.caches


def begin(
    logits_BV: jax.Array,
    caches: Any,
    lengths_B: jax.Array,
    active_B: jax.Array,
    keys_B: jax.Array,
    seen_BV: jax.Array | None,
    settings: Settings,
    allowed_BV: jax.Array | None = None,
) -> Loop:
    """Chooses the first token of prefilled prompts.

    Args:
      logits_BV: logits after the prompts.
      caches: caches with room for M - 1 more tokens; the last new token is never read.
      active_B: False for rows that only fill the batch.
      keys_B: a random key for each row.
      seen_BV: result of sampling.seen_in; None without a repetition penalty.
      allowed_BV: the tokens that may be first in each row, at least one; None for all.
    """
    B, M = logits_BV.shape[0], settings.max_new_tokens
    loop = Loop(
        step=jnp.zeros((), jnp.int32),
        done_B=~active_B,
        decoded=Decoded(
            tokens_BM=jnp.zeros((B, M), jnp.int32),
            log_probs_BM=jnp.zeros((B, M), jnp.float32),
            lengths_B=jnp.zeros(B, jnp.int32),
        ),
        caches=caches,
        lengths_B=lengths_B,
        keys_B=keys_B,
        seen_BV=seen_BV,
    )
    return _choose(loop, logits_BV, settings, allowed_BV)


def advance(
    model: Any,
    params: Any,
    policy: CachePolicy,
    loop: Loop,
    until: jax.Array,
    ended_B: jax.Array,
    settings: Settings,
) -> Loop:
    """Continues until every row has ended or has `until` new tokens.

    Args:
      model: a model with unrolled layers.
      loop: the state to continue; may be donated.
      until: number of new tokens to stop at, at most M.
      ended_B: rows that the host has ended, for example at a stop string.
    """

    def body(loop: Loop) -> Loop:
        last = loop.step - 1
        token_B1 = jax.lax.dynamic_slice_in_dim(loop.decoded.tokens_BM, last, 1, axis=1)
        # Further tokens of an ended row are marked as padding.
        position_B1 = jnp.where(loop.done_B, -1, loop.lengths_B + last)[:, None]
        caches = restored(loop.caches, whole)
        out = read(model, params, policy, token_B1, position_B1, caches)
        logits_BV = model.apply({"params": params}, out.hidden_BTD, method="logits")[:, 0]
        return _choose(dataclasses.replace(loop, caches=carried(out.caches)), logits_BV, settings)

    def more(loop: Loop) -> jax.Array:
        return (loop.step < until) & ~jnp.all(loop.done_B)

    whole = loop.caches
    loop = dataclasses.replace(loop, done_B=loop.done_B | ended_B, caches=carried(whole))
    loop = jax.lax.while_loop(more, body, loop)
    return dataclasses.replace(loop, caches=restored(loop.caches, whole))


def _choose(
    loop: Loop, logits_BV: jax.Array, settings: Settings, allowed_BV: jax.Array | None = None
) -> Loop:
    """Returns the loop with token number `loop.step` added to the rows that have not ended."""
    seen_BV = loop.seen_BV
    token_B, logp_B, ends_B = choose(
        *(logits_BV, loop.keys_B, loop.step, settings),
        seen_BV=seen_BV,
        allowed_BV=allowed_BV,
    )
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
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
        seen_BV=seen_BV,
    )


def choose(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    step: jax.Array,
    settings: Settings,
    *,
    sampling: RowSampling | None = None,
    seen_BV: jax.Array | None = None,
    allowed_BV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the next tokens, the model's log-probabilities of them, and whether they end their rows, each [B].

    Args:
      logits_BV, keys_B, seen_BV, allowed_BV: see `begin`.
      step: number of tokens that have been chosen, of all rows or of each, [B].
      sampling: temperature and top_p of each row; None if all rows have those of the settings.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    choice_BV = only_among(without_padding_ids(logits_BV, settings.num_ids), allowed_BV)
    if seen_BV is not None:
        choice_BV = penalised(choice_BV, seen_BV, settings.sampling.repetition_penalty)
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, jnp.broadcast_to(step, keys_B.shape))
    if sampling is None:
        token_B = sample(choice_BV, keys_B, settings.sampling)
    else:
        token_B = sample_rows(choice_BV, keys_B, sampling)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    logp_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    return token_B, logp_B, jnp.isin(token_B, jnp.asarray(settings.eos_ids, jnp.int32))
