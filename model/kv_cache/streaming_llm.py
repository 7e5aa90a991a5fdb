"""StreamingLLM (Xiao et al., arXiv 2309.17453): the first and the last tokens, for unlimited generation.

Shapes: B batch, T = 1 new token, S slots, C capacity, P sinks, K key/value heads, H head dim.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from espalier.model.kv_cache import slots
from espalier.model.kv_cache.base import AttentionForm, KeyValues
from espalier.model.kv_cache.full import FullCache, Reading
from espalier.model.kv_cache.slots import Slots


@flax.struct.dataclass
class Stream:
    """Slots, which begin with the sinks, and the sinks' keys rotated by their true positions."""

    slots: Slots
    sinks_BKPH: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(FullCache):
    """Keeps attention sinks and a ring of recent tokens: C slots, however many tokens are generated.

    With `renumber`, positions are those within the cache, as in the paper. Rotary attention depends only
    on distances. Distances to recent tokens do not change by renumbering, so recent keys are not rotated
    again; the sinks' keys are rotated by the number of dropped positions. The whole prompt is read before
    tokens are dropped; the paper also drops tokens while it reads the prompt.

    Attributes:
      capacity: slots for a prompt and its continuation together, including the sinks.
      sinks: number of first tokens, which are always kept; a shorter prompt leaves some of their slots empty.
      renumber: whether dropped tokens leave no gap in the positions.
    """

    capacity: int = 1024
    sinks: int = 4
    renumber: bool = True

    def __post_init__(self):
        if not 0 <= self.sinks < self.capacity:
            raise ValueError(
                f"sinks = {self.sinks} must be at least 0 and below capacity = {self.capacity}"
            )

    def most(self, state: Reading) -> int:
        return self.capacity

    def keep(self, state: Reading, *, length: int, dtype: Any) -> Any:
        held, sinks = state.slots, self.sinks
        if held.length + length <= self.capacity:
            return super().keep(state, length=length, dtype=dtype)
        held = held.with_room(max(self.capacity - held.length, 0))
        at_BS = held.positions_BXS[:, 0]
        is_sink_BPS = at_BS[:, None] == jnp.arange(sinks, dtype=jnp.int32)[None, :, None]
        recent_BS = jnp.where(at_BS >= sinks, at_BS, -1)
        # All rows end at the last slot, so the ring's next slot has the oldest token of every row.
        index_BR = slots.latest(recent_BS, self.capacity - sinks)
        index_BC = jnp.concatenate([is_sink_BPS.argmax(-1), index_BR], axis=1)
        real_BC = jnp.concatenate(
            [is_sink_BPS.any(-1), jnp.take_along_axis(recent_BS, index_BR, axis=1) >= 0], axis=1
        )
        held = held.take(index_BC[:, None])
        held = dataclasses.replace(
            held,
            positions_BXS=jnp.where(real_BC[:, None], held.positions_BXS, -1),
            ring=sinks,
            at=jnp.asarray(sinks, jnp.int32),
        )
        stored = held.stored_as(dtype)
        if not (self.renumber and sinks and state.known_form.rope):
            return stored
        return Stream(slots=stored, sinks_BKPH=held.k_BKSH[:, :, :sinks])

    def extend(self, state: Any, k_BTKH, v_BTKH, positions_BT, form: AttentionForm) -> Any:
        if not isinstance(state, Stream):
            return super().extend(state, k_BTKH, v_BTKH, positions_BT, form)
        held = state.slots.put(k_BTKH, v_BTKH, positions_BT)
        B, P = state.sinks_BKPH.shape[0], self.sinks
        at_BXP = held.positions_BXS[:, :, :P]
        missing_B1 = (at_BXP[:, 0] < 0).sum(1, keepdims=True, dtype=jnp.int32)
        dropped_B1 = jnp.maximum(positions_BT + 1 - (self.capacity - missing_B1), 0)
        dropped_BP = jnp.broadcast_to(dropped_B1, (B, P))
        assert form.rope is not None
        k_BPKH = form.rope(state.sinks_BKPH.swapaxes(1, 2), dropped_BP)
        # The mask uses the same positions as the rotation.
        moved_BXP = jnp.arange(P, dtype=jnp.int32)[None, None] + dropped_BP[:, None]
        return dataclasses.replace(
            state,
            slots=held.with_first_keys(k_BPKH, jnp.where(at_BXP < 0, -1, moved_BXP)),
        )

    def view(self, state: Any) -> KeyValues:
        return super().view(state.slots if isinstance(state, Stream) else state)
