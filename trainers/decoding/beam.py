"""Beam search, with the same sequences and scores as Hugging Face's `generate(num_beams=...)`.

Every step ranks the continuations of all running beams by their summed log-probability. Continuations
that end with EOS and are among the best K become finished, with the score sum / length^length_penalty
(Wu et al., arXiv 1609.08144, with the length instead of their equation 14). The best K continuations
that do not end become the running beams. Prompts are independent. After the last step every running
beam is finished.

Shapes: B prompts, K beams, M new tokens at most, C candidates of a step, V vocabulary.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from espalier.model.kv_cache.base import CachePolicy
from espalier.trainers.decoding.prefill import read
from espalier.trainers.decoding.sampling import only_among, penalised, without_padding_ids

# Below any sum of log-probabilities, and finite, as in Hugging Face: the order of sums with it is preserved.
_NEVER = -1.0e9


@flax.struct.dataclass
class Sequences:
    """Beams of every prompt, the best first.

    Attributes:
      tokens_BKM: new tokens, followed by zeros.
      log_probs_BKM: the model's log-probability of each token.
      scores_BK: summed log-probability of a running beam; divided by length^length_penalty if finished.
    """

    tokens_BKM: jax.Array
    log_probs_BKM: jax.Array
    lengths_BK: jax.Array
    scores_BK: jax.Array


@flax.struct.dataclass
class _Search:
    step: jax.Array
    running: Sequences
    finished: Sequences
    is_finished_BK: jax.Array
    open_B: jax.Array  # whether a better finished sequence is still possible
    caches: Any
    seen_BKV: jax.Array | None


def search(
    model: Any,
    params: Any,
    policy: CachePolicy,
    logits_BV: jax.Array,
    caches: Any,
    lengths_B: jax.Array,
    active_B: jax.Array,
    seen_BV: jax.Array | None,
    settings: Any,
    allowed_BV: jax.Array | None = None,
) -> tuple[Sequences, Any]:
    """Continues prefilled prompts; see `decode.begin` and `decode.advance` for the arguments.

    Args:
      caches: caches of B * K rows; rows of one prompt are equal and adjacent.
      settings: settings of generation with `beams`, static.

    Returns:
      The finished sequences, and the caches, so that their memory can be reused.
    """
    B, K, M = len(lengths_B), settings.beams.num_beams, settings.max_new_tokens
    # At the first step the beams of a prompt are equal: only the first counts.
    first_BK = jnp.tile(jnp.where(jnp.arange(K) == 0, 0.0, _NEVER)[None], (B, 1))
    nothing = Sequences(
        tokens_BKM=jnp.zeros((B, K, M), jnp.int32),
        log_probs_BKM=jnp.zeros((B, K, M), jnp.float32),
        lengths_BK=jnp.zeros((B, K), jnp.int32),
        scores_BK=first_BK,
    )
    state = _Search(
        step=jnp.zeros((), jnp.int32),
        running=nothing,
        finished=dataclasses.replace(nothing, scores_BK=jnp.full((B, K), _NEVER)),
        is_finished_BK=jnp.zeros((B, K), bool),
        open_B=active_B,
        caches=caches,
        seen_BKV=None if seen_BV is None else jnp.repeat(seen_BV[:, None], K, axis=1),
    )
    state = _step(state, jnp.repeat(logits_BV, K, axis=0), settings, allowed_BV)

    def body(state: _Search) -> _Search:
        last = state.step - 1
        tokens_BK1 = jax.lax.dynamic_slice_in_dim(state.running.tokens_BKM, last, 1, axis=2)
        positions_B = jnp.where(state.open_B, lengths_B + last, -1)
        positions_X1 = jnp.repeat(positions_B, K)[:, None]
        out = read(model, params, policy, tokens_BK1.reshape(B * K, 1), positions_X1, state.caches)
        logits_XV = model.apply({"params": params}, out.hidden_BTD, method="logits")[:, 0]
        return _step(dataclasses.replace(state, caches=out.caches), logits_XV, settings)

    def more(state: _Search) -> jax.Array:
        return (state.step < M) & jnp.any(state.open_B)

    state = jax.lax.while_loop(more, body, state)
    return state.finished, state.caches


def _step(
    state: _Search, logits_XV: jax.Array, settings: Any, allowed_BV: jax.Array | None = None
) -> _Search:
    """Returns the search after choosing token number `state.step` of every beam."""
    beams, running = settings.beams, state.running
    B, K, M = running.tokens_BKM.shape
    V = logits_XV.shape[-1]
    length = state.step + 1
    logp_XV = jax.nn.log_softmax(logits_XV.astype(jnp.float32))
    choice_BKV = without_padding_ids(logp_XV, settings.num_ids).reshape(B, K, V)
    choice_BKV = only_among(choice_BKV, None if allowed_BV is None else allowed_BV[:, None])
    if state.seen_BKV is not None:
        penalty = settings.sampling.repetition_penalty
        choice_BKV = penalised(choice_BKV, state.seen_BKV, penalty)
    sums_BX = (choice_BKV + running.scores_BK[:, :, None]).reshape(B, K * V)

    # Enough candidates that K of them do not end, even if every beam has candidates with every EOS.
    C = min(max(2, 1 + len(settings.eos_ids)) * K, K * V)
    sums_BC, at_BC = jax.lax.top_k(sums_BX, C)
    beam_BC, token_BC = at_BC // V, at_BC % V
    logp_BC = jnp.take_along_axis(logp_XV.reshape(B, K * V), at_BC, axis=1)
    grown = _take(running, beam_BC)
    grown = dataclasses.replace(
        grown,
        tokens_BKM=_put(grown.tokens_BKM, token_BC, state.step),
        log_probs_BKM=_put(grown.log_probs_BKM, logp_BC, state.step),
        lengths_BK=jnp.full((B, C), length, jnp.int32),
        scores_BK=sums_BC,
    )
    ends_BC = jnp.isin(token_BC, jnp.asarray(settings.eos_ids, jnp.int32)) | (length == M)

    unfinished_BC = sums_BC + jnp.where(ends_BC, _NEVER, 0.0)
    running_sums_BK, running_BK = jax.lax.top_k(unfinished_BC, K)
    new_running = dataclasses.replace(_take(grown, running_BK), scores_BK=running_sums_BK)
    source_BK = jnp.take_along_axis(beam_BC, running_BK, axis=1)

    ended_BC = ends_BC & (jnp.arange(C) < K)[None]
    scores_BC = sums_BC / length.astype(jnp.float32) ** beams.length_penalty
    full_B = jnp.all(state.is_finished_BK, axis=1) & (beams.early_stopping is True)
    closed_BC = ~ended_BC | (full_B | ~state.open_B)[:, None]
    ended = dataclasses.replace(grown, scores_BK=scores_BC + jnp.where(closed_BC, _NEVER, 0.0))
    merged = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), state.finished, ended)
    best_BK = jax.lax.top_k(merged.scores_BK, K)[1]
    finished = _take(merged, best_BK)
    flags_BX = jnp.concatenate([state.is_finished_BK, ended_BC & state.open_B[:, None]], axis=1)
    is_finished_BK = jnp.take_along_axis(flags_BX, best_BK, axis=1)

    reach = M if beams.early_stopping == "never" and beams.length_penalty > 0 else length
    hope_B = new_running.scores_BK[:, 0] / jnp.float32(reach) ** beams.length_penalty
    worst_B = jnp.where(is_finished_BK, finished.scores_BK.min(1, keepdims=True), _NEVER).min(1)
    open_B = state.open_B & (hope_B > worst_B)
    if beams.early_stopping is True:
        open_B = open_B & ~jnp.all(is_finished_BK, axis=1)

    rows_X = (source_BK + K * jnp.arange(B)[:, None]).reshape(-1)
    seen_BKV = state.seen_BKV
    if seen_BKV is not None:
        seen_BKV = jnp.take_along_axis(seen_BKV, source_BK[:, :, None], axis=1)
        chosen_BK = jnp.take_along_axis(token_BC, running_BK, axis=1)
        seen_BKV = seen_BKV.at[jnp.arange(B)[:, None], jnp.arange(K)[None], chosen_BK].set(True)
    return _Search(
        step=length,
        running=new_running,
        finished=finished,
        is_finished_BK=is_finished_BK,
        open_B=open_B,
        # The first axis of every array is rows; scalar counters are shared by all rows.
        caches=jax.tree.map(lambda x: x[rows_X] if x.ndim else x, state.caches),
        seen_BKV=seen_BKV,
    )


def _take(sequences: Sequences, index_BK: jax.Array) -> Sequences:
    """Returns the sequences of each prompt at these indices."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(
            x, index_BK.reshape(*index_BK.shape, *[1] * (x.ndim - 2)), axis=1
        ),
        sequences,
    )


def _put(array_BKM: jax.Array, value_BK: jax.Array, at: jax.Array) -> jax.Array:
    value_BK1 = value_BK.astype(array_BKM.dtype)[:, :, None]
    return jax.lax.dynamic_update_slice_in_dim(array_BKM, value_BK1, at, axis=2)
