"""Policies that ask no scores: all keys that attention can see, a sliding window, or StreamingLLM's first and last tokens.

`FullCache` is the base class of all policies.

Shapes: B batch, T new tokens, S slots, C capacity, P sinks, N query heads, K key/value heads, H head dim.
"""

import dataclasses
from typing import Any, Unpack

import flax.struct
import jax
import jax.numpy as jnp

from espalier.model.kv_cache import slots
from espalier.model.kv_cache.base import AttentionForm, CacheSizes, KeyValues
from espalier.model.kv_cache.slots import Slots


@flax.struct.dataclass
class Reading:
    """The state while a prompt is read: every token in order, including padding at position -1.

    `form` is None before the first token. `evidence` is the policy's record of the queries, or None.
    """

    slots: Slots
    layer: int = flax.struct.field(pytree_node=False)
    num_layers: int = flax.struct.field(pytree_node=False)
    form: AttentionForm | None = flax.struct.field(pytree_node=False, default=None)
    evidence: Any = None

    @property
    def positions_BS(self) -> jax.Array:
        return self.slots.positions_BXS[:, 0]

    @property
    def known_form(self) -> AttentionForm:
        """Returns the settings of attention; raises ValueError before the first token."""
        if self.form is None:
            raise ValueError("A cache is compressed after tokens have been appended to it.")
        return self.form


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullCache:
    """Keeps all tokens that a layer's attention can see.

    The rows of a batch use the same slots, but not the same positions. After the prompt, a layer whose
    window is too short for all tokens uses a ring of `window` slots.
    """

    future = 0

    def init(self, *, batch: int, length: int, **sizes: Unpack[CacheSizes]) -> Reading:
        held = slots.empty(
            (batch, sizes["num_kv_heads"], length, sizes["head_dim"]), sizes["dtype"]
        )
        return Reading(
            slots=held,
            layer=sizes["layer"],
            num_layers=sizes["num_layers"],
            evidence=self.no_evidence(held, sizes["num_heads"]),
        )

    def append(
        self,
        state: Any,
        *,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        positions_BT: jax.Array,
        q_BTNH: jax.Array,
        form: AttentionForm,
    ) -> Any:
        """Adds T tokens; raises the errors of `Slots.put`."""
        if not isinstance(state, Reading):
            return self.extend(state, k_BTKH, v_BTKH, positions_BT, form)
        held = state.slots.put(k_BTKH, v_BTKH, positions_BT)
        state = dataclasses.replace(state, slots=held, form=form)
        evidence = self.observe(state, q_BTNH, positions_BT)
        return dataclasses.replace(state, evidence=evidence)

    def view(self, state: Any) -> KeyValues:
        return (state.slots if isinstance(state, Reading) else state).view()

    def compress(self, state: Reading, *, length: int, dtype: Any = None) -> Any:
        """Returns a ring if the layer's window is within the policy's budget, else the result of `keep`."""
        window = state.known_form.window
        most = self.most(state)
        if window is not None and (most is None or window <= most):
            return rolling(state, window, length=length, dtype=dtype)
        return self.keep(state, length=length, dtype=dtype)

    # Methods that policies override.

    def most(self, state: Reading) -> int | None:
        """Returns the number of prompt tokens to keep; None for all."""
        return None

    def no_evidence(self, held: Slots, num_heads: int) -> Any:
        """Returns the evidence before the first token, for `observe`."""
        return None

    def observe(self, state: Reading, q_BTNH: jax.Array, positions_BT: jax.Array) -> Any:
        """Returns the evidence after further queries, whose keys are already in the slots."""
        return state.evidence

    def keep(self, state: Reading, *, length: int, dtype: Any) -> Any:
        """Returns the compressed state of a layer without a window, or with one longer than the budget."""
        return state.slots.with_room(length).stored_as(dtype).constrained()

    def extend(self, state: Any, k_BTKH, v_BTKH, positions_BT, form: AttentionForm) -> Any:
        """Returns the compressed state with generated tokens added."""
        return state.put(k_BTKH, v_BTKH, positions_BT)


def rolling(state: Reading, window: int, *, length: int, dtype: Any) -> Slots:
    """Returns the last `window` tokens of every row, in a ring if `length` more tokens do not fit."""
    held = state.slots
    if held.length + length <= window:
        return held.with_room(length).stored_as(dtype).constrained()
    if held.length < window:
        held = held.with_room(window - held.length)
    # All rows end at the last slot, so the ring's next slot has the oldest token of every row.
    index_BC = slots.latest(held.positions_BXS[:, 0], window)
    held = held.take(index_BC[:, None]).stored_as(dtype)
    return dataclasses.replace(held, ring=0, at=jnp.zeros((), jnp.int32))


def check_positive(policy: Any, name: str) -> None:
    """Raises ValueError unless the setting `name` of a policy is at least 1."""
    if (value := getattr(policy, name)) < 1:
        raise ValueError(f"{name} = {value} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sliding(FullCache):
    """Keeps only the last tokens, whatever attention a layer was trained with.

    A generated token sees `window` tokens, itself included, or its layer's window if that is shorter.
    Tokens of the prompt see each other as in training.
    """

    window: int = 4096

    def __post_init__(self):
        check_positive(self, "window")

    def most(self, state: Reading) -> int:
        return self.window

    def keep(self, state: Reading, *, length: int, dtype: Any) -> Any:
        return rolling(state, self.window, length=length, dtype=dtype)


@flax.struct.dataclass
class Stream:
    """Slots, which begin with the sinks, and the sinks' keys rotated by their true positions."""

    slots: Slots
    sinks_BKPH: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(FullCache):
    """StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a ring of recent tokens.

    It needs C slots, however many tokens are generated.

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
        k_BPKH = form.rope.moved(state.sinks_BKPH.swapaxes(1, 2), dropped_BP)
        # The mask uses the same positions as the rotation.
        moved_BXP = jnp.arange(P, dtype=jnp.int32)[None, None] + dropped_BP[:, None]
        return dataclasses.replace(
            state,
            slots=held.with_first_keys(k_BPKH, jnp.where(at_BXP < 0, -1, moved_BXP)),
        )

    def view(self, state: Any) -> KeyValues:
        return super().view(state.slots if isinstance(state, Stream) else state)
