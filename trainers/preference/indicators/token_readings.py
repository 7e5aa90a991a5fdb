"""What a model says at each place of a text: the target's log-probability, and how it spreads over the likeliest tokens.

Over-optimisation of preferences shows in the k likeliest next tokens (arXiv 2410.11677, section 5): their entropy first
rises and then falls, or their mass falls.

Shapes: T tokens (batch and length joined), C tokens of a chunk, D width, V vocabulary, K likeliest tokens.
"""

import flax.struct
import jax
import jax.numpy as jnp

from model.kernels.cross_entropy import map_tokens
from model.kernels.vocab_logits import LogitForm

TOP_K = 10  # of the paper: entropies of at most log2(10) = 3.32 bits


@flax.struct.dataclass
class TokenReadings:
    """Of every token, float32.

    Attributes:
      log_probs: natural logarithm of the target's probability.
      entropies: in bits, over the likeliest tokens as if there were no others.
      masses: probability of the likeliest tokens together.
    """

    log_probs: jax.Array
    entropies: jax.Array
    masses: jax.Array


def top_k_entropy_and_mass(logits_TV: jax.Array, *, k: int = TOP_K) -> tuple[jax.Array, jax.Array]:
    """(entropy in bits [T] of the k likeliest tokens, renormalised; their probability [T], which is not).

    Of fewer than k tokens all are taken.
    """
    logits_TV = logits_TV.astype(jnp.float32)
    top_TK = jax.lax.top_k(logits_TV, min(k, logits_TV.shape[-1]))[0]
    mass_T = jnp.exp(jax.nn.logsumexp(top_TK, axis=-1) - jax.nn.logsumexp(logits_TV, axis=-1))
    log_q_TK = jax.nn.log_softmax(top_TK, axis=-1)
    q_TK = jnp.exp(log_q_TK)
    # What cannot be (a logit of -inf) adds nothing.
    nats_T = -jnp.where(q_TK > 0, q_TK * log_q_TK, 0.0).sum(-1)
    return jnp.maximum(nats_T, 0.0) / jnp.log(2.0), mass_T


def read_tokens(
    h_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    *,
    k: int = TOP_K,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = 512,
) -> TokenReadings:
    """Readings after hidden states, computed a chunk of tokens at a time (see `map_tokens`).

    Args:
      h_TD: hidden states.
      head_VD: rows of the output matrix, cast to the dtype of h.
      targets_T: ids in [0, V).
      k: tokens that count as the likeliest.
      logit_scale, softcap: see `weighted_cross_entropy`.
      chunk: tokens at a time, see `chunk_size`.

    Raises:
      ValueError: k or chunk below 1.
    """
    if k < 1:
        raise ValueError(f"k = {k} must be at least 1.")
    form = LogitForm(float(logit_scale), None if softcap is None else float(softcap))
    head_VD = head_VD.astype(h_TD.dtype)

    def read(h_CD: jax.Array, targets_C: jax.Array) -> TokenReadings:
        logits_CV = form.logits(h_CD, head_VD)
        target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        log_p_C = target_C - jax.nn.logsumexp(logits_CV, axis=-1)
        return TokenReadings(log_p_C, *top_k_entropy_and_mass(logits_CV, k=k))

    return map_tokens(read, h_TD, targets_T, vocab=head_VD.shape[0], chunk=chunk)
