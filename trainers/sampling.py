"""The choice of the next token. Shapes: B batch, V vocabulary, C candidates."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the restrictions apply in the order of the attributes.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (the first of equals).
      top_k: draw among the k most probable; None for all.
      top_p: then among the fewest whose probabilities add up to at least p (nucleus sampling,
        arXiv 1904.09751); None for all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be 0 (greedy) or positive.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1; leave it out for all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be in (0, 1].")


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
    return logits_BC, ids_BC


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Token ids [B]; each row has its own key, so that it does not depend on its neighbours."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    if sampling.top_k is None and sampling.top_p is None:  # spares the sorting
        return draw(keys_B, logits_BV.astype(jnp.float32) / sampling.temperature).astype(jnp.int32)
    logits_BC, ids_BC = candidates(logits_BV, sampling)
    drawn_B = draw(keys_B, logits_BC)
    return jnp.take_along_axis(ids_BC, drawn_B[:, None], axis=1)[:, 0]
