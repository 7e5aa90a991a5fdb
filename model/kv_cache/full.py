"""Keep everything: the reference policy. Shapes as in base.py.

Keys and values lie head by head, [B, K, S, H]: the products of attention then read them in order. By
token, [B, S, K, H], they would be transposed anew for every new token.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model.config import LayerKind
from model.kv_cache.base import AttentionForm, KeyValues


@flax.struct.dataclass
class FullState:
    """Slots [0, used) hold tokens in order of arrival, padding included at position -1."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    positions_BS: jax.Array
    used: jax.Array


class FullCache:
    """Appends at the next free slots; rows of a batch share the slot index, not the position."""

    def init(
        self,
        *,
        batch: int,
        length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        layer: int,
        kind: LayerKind,
    ) -> FullState:
        del layer, kind  # all are alike
        shape = (batch, num_kv_heads, length, head_dim)
        return FullState(
            k_BKSH=jnp.zeros(shape, dtype),
            v_BKSH=jnp.zeros(shape, dtype),
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
        form: AttentionForm,
    ) -> FullState:
        """The caller sizes the cache: tokens past its length would overwrite the last slots."""
        del q_BTNH, form  # every key is kept, so none is scored
        at = state.used

        def put(held_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            new_BKTH = new_BTKH.swapaxes(1, 2).astype(held_BKSH.dtype)
            return jax.lax.dynamic_update_slice_in_dim(held_BKSH, new_BKTH, at, axis=2)

        return FullState(
            k_BKSH=put(state.k_BKSH, k_BTKH),
            v_BKSH=put(state.v_BKSH, v_BTKH),
            positions_BS=jax.lax.dynamic_update_slice_in_dim(
                state.positions_BS, positions_BT.astype(jnp.int32), at, axis=1
            ),
            used=at + k_BTKH.shape[1],
        )

    def view(self, state: FullState) -> KeyValues:
        # A change of view: the compiler folds it into the products.
        return KeyValues(
            k_BSKH=state.k_BKSH.swapaxes(1, 2),
            v_BSKH=state.v_BKSH.swapaxes(1, 2),
            positions_BS=state.positions_BS,
        )

    def compress(self, state: FullState, *, length: int) -> FullState:
        """Nothing is dropped; only room for `length` more tokens is added."""
        pad = ((0, 0), (0, 0), (0, length), (0, 0))
        return FullState(
            k_BKSH=jnp.pad(state.k_BKSH, pad),
            v_BKSH=jnp.pad(state.v_BKSH, pad),
            positions_BS=jnp.pad(state.positions_BS, pad[1:3], constant_values=-1),
            used=state.used,
        )
