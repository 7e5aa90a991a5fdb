"""The choice of the next token.

Restrictions are as in Hugging Face's `generate`, in the same order: repetition penalty,
temperature, top-k, top-p, min-p.

Shapes: B batch, T prompt length, V vocabulary, C candidates.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from espalier.trainers.decoding.settings import Sampling


@flax.struct.dataclass
class RowSampling:
    """The temperature and top_p of each row, [B]; see `Sampling`. A top_p of 1 allows all tokens."""

    temperature_B: jax.Array | np.ndarray
    top_p_B: jax.Array | np.ndarray


def without_padding_ids(logits_BV: jax.Array, num_ids: int | None) -> jax.Array:
    """Returns logits with -inf for ids from `num_ids` on (padding of the model's table); None changes nothing."""
    if num_ids is None or num_ids >= logits_BV.shape[-1]:
        return logits_BV
    known_V = jnp.arange(logits_BV.shape[-1]) < num_ids
    return jnp.where(known_V[None], logits_BV, -jnp.inf)


def only_among(logits_BV: jax.Array, allowed_BV: jax.Array | None) -> jax.Array:
    """Returns logits with -inf for tokens that are not allowed; None changes nothing."""
    return logits_BV if allowed_BV is None else jnp.where(allowed_BV, logits_BV, -jnp.inf)


def seen_in(tokens_BT: jax.Array, lengths_B: jax.Array, vocab_size: int) -> jax.Array:
    """Returns True [B, V] for the tokens of each prompt, without padding."""
    real_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
    rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    # Padding gets an index outside the table, where the update is dropped.
    ids_BT = jnp.where(real_BT, tokens_BT, vocab_size)
    seen_BV = jnp.zeros((tokens_BT.shape[0], vocab_size), bool)
    return seen_BV.at[rows_B1, ids_BT].set(True, mode="drop")


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Returns logits (or log-probabilities) with the repetition penalty applied at seen tokens."""
    scaled_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, scaled_BV, logits_BV)


def candidates(logits_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Returns (logits_BC, ids_BC) of tokens that may be drawn, most probable first; -inf for excluded ones."""
    scaled_BV = logits_BV.astype(jnp.float32) / sampling.temperature
    count = min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    logits_BC, ids_BC = jax.lax.top_k(scaled_BV, count)
    if sampling.top_p is not None:
        logits_BC = _nucleus(logits_BC, sampling.top_p)
    if sampling.min_p is not None:
        probs_BC = jax.nn.softmax(logits_BC)
        enough_BC = probs_BC >= sampling.min_p * probs_BC[:, :1]
        logits_BC = jnp.where(enough_BC, logits_BC, -jnp.inf)
    return logits_BC, ids_BC


def _nucleus(logits_BC: jax.Array, top_p: float | jax.Array | np.ndarray) -> jax.Array:
    """Returns sorted logits with -inf for tokens outside the nucleus; `top_p` is a number, or [B, 1]."""
    probs_BC = jax.nn.softmax(logits_BC)
    # A token is allowed while the probabilities before it sum to less than p; the first always is.
    before_BC = jnp.cumsum(probs_BC, -1) - probs_BC
    return jnp.where(before_BC < top_p, logits_BC, -jnp.inf)


def sample_rows(logits_BV: jax.Array, keys_B: jax.Array, rows: RowSampling) -> jax.Array:
    """Returns token ids [B], each as `sample` draws it with the settings of its row."""
    greedy_B, nucleus_B = rows.temperature_B == 0, rows.top_p_B < 1
    temperature_B1 = jnp.where(greedy_B, 1.0, rows.temperature_B)[:, None]
    scaled_BV = logits_BV.astype(jnp.float32) / temperature_B1
    draw = jax.vmap(jax.random.categorical)

    def within_nucleus() -> jax.Array:
        logits_BC, ids_BC = jax.lax.top_k(scaled_BV, scaled_BV.shape[-1])
        drawn_B = draw(keys_B, _nucleus(logits_BC, rows.top_p_B[:, None]))
        return jnp.take_along_axis(ids_BC, drawn_B[:, None], axis=1)[:, 0].astype(jnp.int32)

    drawn_B = draw(keys_B, scaled_BV).astype(jnp.int32)
    # The sort costs more than the rest, so it runs only for batches that need it.
    restricted_B = jax.lax.cond(jnp.any(nucleus_B), within_nucleus, lambda: drawn_B)
    drawn_B = jnp.where(nucleus_B, restricted_B, drawn_B)
    return jnp.where(greedy_B, jnp.argmax(logits_BV, -1).astype(jnp.int32), drawn_B)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns token ids [B]; each row has its own key and does not depend on other rows.

    The caller applies the repetition penalty first (see `penalised`).
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    if not sampling.restricted:  # avoids the sort
        return draw(keys_B, logits_BV.astype(jnp.float32) / sampling.temperature).astype(jnp.int32)
    logits_BC, ids_BC = candidates(logits_BV, sampling)
    drawn_B = draw(keys_B, logits_BC)
    return jnp.take_along_axis(ids_BC, drawn_B[:, None], axis=1)[:, 0]
