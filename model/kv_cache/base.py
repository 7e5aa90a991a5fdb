"""The cache policy seam: what a decoder keeps of the keys and values it has seen.

A policy is a stateless object; its state is a pytree that goes in and comes out. Every slot carries
the position of its token, -1 while empty, so padding, unequal prompts, eviction and windows all
reduce to one mask by position.

Shapes: B batch, T new tokens, S slots, N query heads, K key/value heads, H head dim.
"""

from typing import Any, Protocol

import flax.struct
import jax


@flax.struct.dataclass
class KeyValues:
    """What attention may look at: slots with position -1 are empty."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array


class CachePolicy(Protocol):
    """Pure functions over one layer's cache state."""

    def init(self, *, batch: int, length: int, num_kv_heads: int, head_dim: int, dtype: Any) -> Any:
        """An empty state with room for `length` tokens."""
        ...

    def append(
        self,
        state: Any,
        *,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        positions_BT: jax.Array,
        q_BTNH: jax.Array,
    ) -> Any:
        """Adds T tokens; position -1 marks padding. Queries are there for policies that score keys."""
        ...

    def view(self, state: Any) -> KeyValues:
        """The keys and values to attend to."""
        ...

    def compress(self, state: Any, *, length: int) -> Any:
        """Turns a prefilled state into the one decoding starts from, with room for `length` more."""
        ...
