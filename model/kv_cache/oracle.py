"""A control: tokens chosen by the attention that generation will in fact pay to them.

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
    """The prompt's tokens that its known continuation attends to most: what no method can know.

    The last `future` tokens of what is read are that continuation. They vote and are dropped, and
    decoding starts where they did: from logits after the token before them (trainers/decoding/prefill.py), at
    position `length - future`. Every row must be longer than that.

    Attributes:
      capacity: slots for the prompt, of each key/value head.
      future: tokens of the continuation.
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
