"""Keep everything: the reference policy. Shapes as in base.py."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model.kv_cache.base import KeyValues


@flax.struct.dataclass
class FullState:
    """Slots [0, used) hold tokens in order of arrival, padding included at position -1."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    used: jax.Array


class FullCache:
    """Appends at the next free slots; rows of a batch share the slot index, not the position."""

    def init(
        self, *, batch: int, length: int, num_kv_heads: int, head_dim: int, dtype: Any
    ) -> FullState:
        shape = (batch, length, num_kv_heads, head_dim)
        return FullState(
            k_BSKH=jnp.zeros(shape, dtype),
            v_BSKH=jnp.zeros(shape, dtype),
            positions_BS=jnp.full((batch, length), -1, jnp.int32),
            used=jnp.zeros((), jnp.int32),
        )

    def append(
        self,
        state: FullState,
        *,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        positions_BT: jax.Array,
        q_BTNH: jax.Array,
    ) -> FullState:
        """The caller sizes the cache: tokens past its length would overwrite the last slots."""
        del q_BTNH  # every key is kept, so none is scored
        at = state.used
        return FullState(
            k_BSKH=jax.lax.dynamic_update_slice_in_dim(
                state.k_BSKH, k_BTKH.astype(state.k_BSKH.dtype), at, axis=1
            ),
            v_BSKH=jax.lax.dynamic_update_slice_in_dim(
                state.v_BSKH, v_BTKH.astype(state.v_BSKH.dtype), at, axis=1
            ),
            positions_BS=jax.lax.dynamic_update_slice_in_dim(
                state.positions_BS, positions_BT.astype(jnp.int32), at, axis=1
            ),
            used=at + k_BTKH.shape[1],
        )

    def view(self, state: FullState) -> KeyValues:
        return KeyValues(state.k_BSKH, state.v_BSKH, state.positions_BS)

    def compress(self, state: FullState, *, length: int) -> FullState:
        """Nothing is dropped; only room for `length` more tokens is added."""
        pad = ((0, 0), (0, length), (0, 0), (0, 0))
        return FullState(
            k_BSKH=jnp.pad(state.k_BSKH, pad),
            v_BSKH=jnp.pad(state.v_BSKH, pad),
            positions_BS=jnp.pad(state.positions_BS, pad[:2], constant_values=-1),
            used=state.used,
        )
