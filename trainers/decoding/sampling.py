"""The choice of the next token.

Restrictions are as in transformers' `generate`, in its order: repetition penalty, temperature,
top-k, top-p, min-p.

Shapes: B batch, T prompt length, V vocabulary, C candidates.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; `repetition_penalty` comes first, then the attributes in order.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (the first of equals).
      top_k: draw among the k most probable, the first of equals; None for all.
      top_p: then among the fewest whose probabilities add up to at least p (nucleus sampling,
        arXiv 1904.09751); None for all.
      min_p: then among those at least p times as probable as the most probable one (arXiv
        2407.01082); None for all.
      repetition_penalty: r > 0 makes every token of the prompt and of what was generated less
        probable: its logit is divided by r if positive, else multiplied (CTRL, arXiv 1909.05858,
        section 4.1, with the sign minded as transformers does); 1 for none. Greedy choices heed it.

    Raises:
      ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be 0 (greedy) or positive.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1; leave it out for all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be in (0, 1].")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p} must be in [0, 1].")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty = {self.repetition_penalty} must be positive; 1 is for none."
            )

    @property
    def restricted(self) -> bool:
        """Whether only some of the tokens may be drawn."""
        return any(value is not None for value in (self.top_k, self.top_p, self.min_p))


def seen_in(tokens_BT: jax.Array, lengths_B: jax.Array, vocab_size: int) -> jax.Array:
    """True [B, V] for the tokens of each prompt, padding apart."""
    real_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
    rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    # Padding is put outside the table, where it is dropped.
    ids_BT = jnp.where(real_BT, tokens_BT, vocab_size)
    seen_BV = jnp.zeros((tokens_BT.shape[0], vocab_size), bool)
    return seen_BV.at[rows_B1, ids_BT].set(True, mode="drop")


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Returns logits (or log-probabilities), lowered at seen tokens."""
    scaled_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, scaled_BV, logits_BV)


def candidates(logits_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Tokens that may be drawn, the most probable first: (logits_BC, ids_BC), -inf for the excluded."""
    scaled_BV = logits_BV.astype(jnp.float32) / sampling.temperature
    count = min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    logits_BC, ids_BC = jax.lax.top_k(scaled_BV, count)
    if sampling.top_p is not None:
        probs_BC = jax.nn.softmax(logits_BC)
        # A token stays while those before it fall short of p; the first one always does.
        before_BC = jnp.cumsum(probs_BC, -1) - probs_BC
        logits_BC = jnp.where(before_BC < sampling.top_p, logits_BC, -jnp.inf)
    if sampling.min_p is not None:
        probs_BC = jax.nn.softmax(logits_BC)
        enough_BC = probs_BC >= sampling.min_p * probs_BC[:, :1]
        logits_BC = jnp.where(enough_BC, logits_BC, -jnp.inf)
    return logits_BC, ids_BC


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Token ids [B]; each row has its own key, so that it does not depend on its neighbours.

    The repetition penalty, which needs to know what was seen, is applied before (see `penalised`).
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    if not sampling.restricted:  # spares the sorting
        return draw(keys_B, logits_BV.astype(jnp.float32) / sampling.temperature).astype(jnp.int32)
    logits_BC, ids_BC = candidates(logits_BV, sampling)
    drawn_B = draw(keys_B, logits_BC)
    return jnp.take_along_axis(ids_BC, drawn_B[:, None], axis=1)[:, 0]
