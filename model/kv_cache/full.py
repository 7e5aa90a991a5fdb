"""Keep all that attention can see: the reference policy, and what the others have in common.

Shapes: B batch, T new tokens, S slots, N query heads, K key/value heads, H head dim.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from model.config import LayerKind
from model.kv_cache import slots
from model.kv_cache.base import AttentionForm, KeyValues
from model.kv_cache.slots import Slots


@flax.struct.dataclass
class Reading:
    """While a prompt is read: every token, in order of arrival, padding included at position -1.

    Attributes:
      slots: their keys and values.
      layer, num_layers: which layer this is.
      form: of the layer's attention; None before the first token.
      evidence: what the policy has seen of the queries, or None.
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
        """Returns the attention form, recorded with the first token."""
        if self.form is None:
            raise ValueError("A cache is compressed after tokens have been appended to it.")
        return self.form


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullCache:
    """Drops nothing but what a layer's window hides.

    Rows of a batch share the index of the slot, not the position. After the prompt, a layer whose
    window is shorter than what is to come keeps a ring of `window` slots.
    """

    future = 0

    def init(
        self,
        *,
        batch: int,
        length: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        layer: int,
        num_layers: int,
        kind: LayerKind,
    ) -> Reading:
        del kind  # append hears more of it
        held = slots.empty(
            batch=batch, length=length, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype
        )
        evidence = self.no_evidence(held, num_heads)
        return Reading(slots=held, layer=layer, num_layers=num_layers, evidence=evidence)

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
        """The caller sizes the cache: without a ring, tokens past its length overwrite the last."""
        if not isinstance(state, Reading):
            return self.extend(state, k_BTKH, v_BTKH, positions_BT, form)
        held = state.slots.put(k_BTKH, v_BTKH, positions_BT)
        state = dataclasses.replace(state, slots=held, form=form)
        evidence = self.observe(state, q_BTNH, positions_BT)
        return dataclasses.replace(state, evidence=evidence)

    def view(self, state: Any) -> KeyValues:
        return (state.slots if isinstance(state, Reading) else state).view()

    def compress(self, state: Reading, *, length: int, dtype: Any = None) -> Any:
        """A ring where the layer's window is all that is needed, else what the policy keeps."""
        window = state.known_form.window
        most = self.most(state)
        if window is not None and (most is None or window <= most):
            return rolling(state, window, length=length, dtype=dtype)
        return self.keep(state, length=length, dtype=dtype)

    # What policies override.

    def most(self, state: Reading) -> int | None:
        """Number of tokens of a prompt that stay; None for all."""
        del state
        return None

    def no_evidence(self, held: Slots, num_heads: int) -> Any:
        """Returns the state that `observe` starts from."""
        del held, num_heads

    def observe(self, state: Reading, q_BTNH: jax.Array, positions_BT: jax.Array) -> Any:
        """state.evidence after further queries, whose keys are in the slots already."""
        del q_BTNH, positions_BT
        return state.evidence

    def keep(self, state: Reading, *, length: int, dtype: Any) -> Any:
        """Like `compress`, for layers without a window or with a long one."""
        return state.slots.with_room(length).stored_as(dtype).constrained()

    def extend(
        self,
        state: Any,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        positions_BT: jax.Array,
        form: AttentionForm,
    ) -> Any:
        """Adds what is generated."""
        del form
        return state.put(k_BTKH, v_BTKH, positions_BT)


def rolling(state: Reading, window: int, *, length: int, dtype: Any) -> Slots:
    """The last `window` tokens of every row, in a ring if `length` more would not fit beside them."""
    held = state.slots
    if held.length + length <= window:
        return held.with_room(length).stored_as(dtype).constrained()
    if held.length < window:
        held = held.with_room(window - held.length)
    # Rows end together, at the last slot, so the ring's next slot is the oldest of every row.
    index_BC = slots.latest(held.positions_BXS[:, 0], window)
    held = held.take(index_BC[:, None]).stored_as(dtype)
    return dataclasses.replace(held, ring=0, at=jnp.zeros((), jnp.int32))
