"""A control that keeps the tokens that the continuation will attend to.

Shapes: B batch, S slots, K key/value heads, G query heads of each.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from model.kv_cache import scores
from model.kv_cache.full import Reading
from model.kv_cache.scores import of_group
from model.kv_cache.selecting import Selecting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(Selecting):
    """Keeps the prompt's tokens that its known continuation attends to most; no real method knows these.

    The continuation is the last `future` tokens that are read. They vote and are then dropped. Decoding starts at
    their first position, `length - future`, from the logits after the token before it
    (trainers/decoding/prefill.py). Every row must have more than `future` tokens.

    Attributes:
      capacity: slots per key/value head for the prompt.
      future: number of tokens of the continuation.
    """

    future: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.future < 1:
            raise ValueError(f"future = {self.future} must be at least 1")

    @property
    def observed(self) -> int:
        return self.future

    def compress(self, state: Reading, *, length: int, dtype: Any = None) -> Any:
        seen, held = state.evidence, state.slots
        votes_BKGS = scores.votes(seen.q_BWNH, seen.positions_BW, held, state.known_form)
        future_BS = scores.recent(state.positions_BS, self.future)
        held = dataclasses.replace(
            held, positions_BXS=jnp.where(future_BS[:, None], -1, held.positions_BXS)
        )
        state = dataclasses.replace(state, slots=held, evidence=votes_BKGS)
        return super().compress(state, length=length, dtype=dtype)

    def scores(self, state: Reading) -> jax.Array:
        return scores.ranked(of_group(state.evidence, "mean"), state.positions_BS, window=0)
