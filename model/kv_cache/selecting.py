"""Base class of policies that keep the best tokens of a prompt and all generated tokens.

Tokens are selected once, after the whole prompt. Selected keys and generated tokens have their true
positions; nothing is renumbered. A row with fewer tokens than the capacity keeps all of them.

Shapes: B batch, T new tokens, W observed queries, S slots, N query heads, K key/value heads, X 1 or K,
H head dim.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model.kv_cache import scores, slots
from model.kv_cache.full import FullCache, Reading
from model.kv_cache.slots import Slots


@flax.struct.dataclass
class Observed:
    """The last W queries of every row, right-aligned; position -1 where a row has fewer."""

    q_BWNH: jax.Array
    positions_BW: jax.Array

    @classmethod
    def none(cls, held: Slots, num_heads: int, count: int) -> "Observed":
        batch, _, _, head_dim = held.k_BKSH.shape
        return cls(
            q_BWNH=jnp.zeros((batch, count, num_heads, head_dim), held.k_BKSH.dtype),
            positions_BW=jnp.full((batch, count), -1, jnp.int32),
        )

    def then(self, q_BTNH: jax.Array, positions_BT: jax.Array) -> "Observed":
        """Returns the last W queries after T more queries."""
        q_BUNH = jnp.concatenate([self.q_BWNH, q_BTNH.astype(self.q_BWNH.dtype)], axis=1)
        positions_BU = jnp.concatenate([self.positions_BW, positions_BT.astype(jnp.int32)], axis=1)
        index_BW = slots.latest(positions_BU, self.positions_BW.shape[1])
        return Observed(
            q_BWNH=jnp.take_along_axis(q_BUNH, index_BW[:, :, None, None], axis=1),
            positions_BW=jnp.take_along_axis(positions_BU, index_BW, axis=1),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selecting(FullCache):
    """Keeps `capacity` tokens of a prompt in every layer.

    Attributes:
      capacity: slots per key/value head for the prompt.
    """

    capacity: int = 1024

    def __post_init__(self):
        if self.capacity < 1:
            raise ValueError(f"capacity = {self.capacity} must be at least 1")

    def most(self, state: Reading) -> int:
        del state
        return self.capacity

    def no_evidence(self, held: Slots, num_heads: int) -> Any:
        return Observed.none(held, num_heads, self.observed) if self.observed else None

    def observe(self, state: Reading, q_BTNH: jax.Array, positions_BT: jax.Array) -> Any:
        return state.evidence.then(q_BTNH, positions_BT) if self.observed else None

    def keep(self, state: Reading, *, length: int, dtype: Any) -> Any:
        budget = self.most(state)
        if budget >= state.slots.length:
            return super().keep(state, length=length, dtype=dtype)
        return self.chosen(state, budget, length=length, dtype=dtype)

    def chosen(self, state: Reading, budget: int, *, length: int, dtype: Any) -> Any:
        """Returns the slots of the best `budget` tokens of each head."""
        held = state.slots.take(scores.best(self.scores(state), budget))
        return held.stored_as(dtype).with_room(length).constrained()

    # Members that policies override.

    @property
    def observed(self) -> int:
        """The number of last queries that `scores` needs in state.evidence."""
        return 0

    def scores(self, state: Reading) -> jax.Array:
        """Returns scores [B, X, S], -inf for empty slots; the slots with the highest scores are kept."""
        raise TypeError(f"{type(self).__name__} must say how it scores tokens.")


def check_window(capacity: int, window: int) -> None:
    """Raises ValueError unless 1 <= window < capacity."""
    if not 1 <= window < capacity:
        raise ValueError(f"window = {window} must be at least 1 and below capacity = {capacity}")
