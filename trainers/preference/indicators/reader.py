"""Computes log-probabilities of completions after their prompts, and entropy and mass of the top-k tokens.

Over-optimisation of preferences is visible in the k likeliest next tokens (arXiv 2410.11677, section 5): their entropy
first rises and then falls, or their mass falls.

Shapes: B rows, T tokens (of a row, or of all rows joined), C tokens of a chunk, D width, V vocabulary, K top tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from espalier.model.kernels.cross_entropy import map_tokens
from espalier.model.kernels.vocab_logits import LogitForm
from espalier.trainers.decoding.buckets import in_order
from espalier.trainers.objectives.forward import frozen_forward
from espalier.trainers.scoring.scoring import Batched, Row, scored_columns

_SHORTEST = 16  # tokens of a row: short completions would otherwise be mostly padding
TOP_K = 10  # the paper's value; entropies are at most log2(10) = 3.32 bits


@flax.struct.dataclass
class TokenReadings:
    """Values of every token, float32.

    Attributes:
      log_probs: natural logarithm of the target's probability.
      entropies: in bits, of the likeliest tokens with their probabilities renormalised.
      masses: probability of the likeliest tokens together.
    """

    log_probs: jax.Array
    entropies: jax.Array
    masses: jax.Array


def top_k_entropy_and_mass(logits_TV: jax.Array, *, k: int = TOP_K) -> tuple[jax.Array, jax.Array]:
    """Returns (entropy in bits [T] of the k likeliest tokens, renormalised; their total probability [T]).

    A vocabulary of fewer than k tokens is used whole.
    """
    logits_TV = logits_TV.astype(jnp.float32)
    top_TK = jax.lax.top_k(logits_TV, min(k, logits_TV.shape[-1]))[0]
    mass_T = jnp.exp(jax.nn.logsumexp(top_TK, axis=-1) - jax.nn.logsumexp(logits_TV, axis=-1))
    log_q_TK = jax.nn.log_softmax(top_TK, axis=-1)
    q_TK = jnp.exp(log_q_TK)
    # An impossible token (logit -inf) adds nothing.
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
    """Returns the readings of all tokens, computed a chunk of tokens at a time (see `map_tokens`).

    Args:
      head_VD: rows of the output matrix, cast to the dtype of h.
      targets_T: ids in [0, V).
      logit_scale, softcap: see `weighted_cross_entropy`.
      chunk: tokens at a time.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readings:
    """Values of one completion.

    Attributes:
      log_prob: natural logarithm of its probability.
      entropy, mass: means over its tokens, see `TokenReadings`.
    """

    log_prob: float
    length: int
    entropy: float
    mass: float

    @property
    def mean_log_prob(self) -> float:
        """Log-probability per token."""
        return self.log_prob / self.length


class Reader:
    """Computes readings of completions in batches of similar length; compiles once per length, a power of two.

    Args:
      model: a decoder-only module.
      batch_size: rows at a time, a multiple of the mesh's parts of a batch.
      sharding: of the rows of a batch.
    """

    def __init__(self, model: Any, *, batch_size: int, sharding: NamedSharding, k: int = TOP_K):
        def read(params: Any, batch: dict[str, jax.Array]) -> TokenReadings:
            out = frozen_forward(model, params, batch)
            readings = read_tokens(
                out.hidden_XD,
                out.head_VD(),
                batch["decoder_target_tokens"].reshape(-1),
                k=k,
                logit_scale=model.logit_scale,
                softcap=model.logit_softcap,
            )
            shape = batch["decoder_target_tokens"].shape
            return jax.tree.map(lambda x: x.reshape(shape), readings)

        self._batch_size = batch_size
        self._read = Batched(
            read,
            scored_columns,
            model,
            batch_size=batch_size,
            sharding=sharding,
            bucket=_power_of_two,
        )

    def batches(self, count: int) -> int:
        """Returns the number of batches for `count` sequences."""
        return -(-count // self._batch_size)

    def __call__(
        self, params: Any, rows: Sequence[Row], *, done: Callable[[], None] = lambda: None
    ) -> list[Readings]:
        """Returns readings of rows with a context and at least one target, in their order.

        Args:
          done: called after each batch.

        Raises:
          ValueError: a row is longer than the model's learned positions.
        """
        limit, lengths = self._read.limit, [row.inputs for row in rows]
        if limit is not None and max(lengths, default=0) > limit:
            raise ValueError(
                f"A held-out pair, or a prompt with its output, has {max(lengths)} tokens, but the model learned "
                f"only {limit} positions. Lower max_new_tokens, or the max_length of the held-out pairs."
            )

        def means(row: Row, tokens: TokenReadings) -> Readings:
            places = slice(len(row.context) - 1, row.inputs)
            return Readings(
                log_prob=float(tokens.log_probs[places].sum(dtype=np.float64)),
                length=len(row.targets),
                entropy=float(tokens.entropies[places].mean(dtype=np.float64)),
                mass=float(tokens.masses[places].mean(dtype=np.float64)),
            )

        readings = self._read(params, rows, lengths, done=done)
        return list(in_order((i, means(rows[i], tokens)) for i, tokens in readings))


def _power_of_two(length: int, *, limit: int | None) -> int:
    longest = max(_SHORTEST, 1 << (length - 1).bit_length())
    return longest if limit is None else min(longest, limit)
