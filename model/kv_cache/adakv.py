"""Ada-KV (Feng et al., arXiv 2407.11550): the heads of a layer share its slots according to their votes.

Shapes: B batch, T new tokens, S slots of the prompt, C slots of a head on average, F slots of all
heads together, N query heads, K key/value heads, H head dim.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from espalier.model.kv_cache import scores
from espalier.model.kv_cache.base import AttentionForm, KeyValues
from espalier.model.kv_cache.full import Reading
from espalier.model.kv_cache.slots import Slots
from espalier.model.kv_cache.snapkv import SnapKV


@flax.struct.dataclass
class Flat:
    """Slots shared by all heads: slot f holds a token of key/value head owner_BF[:, f]."""

    slots: Slots
    owner_BF: jax.Array
    num_kv_heads: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV with one budget per layer: keeps the tokens with the highest votes over all its heads.

    A layer has K * capacity slots, which its heads share unequally. Every query head is multiplied with
    all slots and masked to its own, which costs K times the products. The slots are replicated over the
    devices of a tensor-parallel mesh.

    Attributes:
      safeguard: fraction of an equal share, capacity - window, that every head keeps.
    """

    safeguard: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard = {self.safeguard} must be between 0 and 1")

    def chosen(self, state: Reading, budget: int, *, length: int, dtype: Any) -> Flat:
        held = state.slots
        B, K, S, H = held.k_BKSH.shape
        F = K * budget
        # The top scores of each head are its window, then its guaranteed tokens.
        scores_BKS = self.scores(state)
        safe = self.window + int(self.safeguard * (budget - self.window))
        top_BKC, index_BKC = jax.lax.top_k(scores_BKS, safe)
        firm_BKC = jnp.where(jnp.isneginf(top_BKC), top_BKC, jnp.inf)
        scores_BKS = jnp.put_along_axis(scores_BKS, index_BKC, firm_BKC, axis=-1, inplace=False)
        index_BF = scores.best(scores_BKS.reshape(B, 1, K * S), F)[:, 0]
        flat = Slots(
            k_BKSH=held.k_BKSH.reshape(B, 1, K * S, H),
            v_BKSH=held.v_BKSH.reshape(B, 1, K * S, H),
            positions_BXS=jnp.tile(held.positions_BXS, (1, 1, K)),
            at=held.at,
        )
        flat = flat.take(index_BF[:, None]).stored_as(dtype).with_room(K * length).constrained()
        # Each new token takes K slots, one per head in order, so the owners of free slots are known.
        new_F = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[None], (B, K))
        owner_BF = jnp.concatenate(
            [(index_BF // S).astype(jnp.int32), jnp.tile(new_F, (1, length))], axis=1
        )
        return Flat(slots=flat, owner_BF=owner_BF, num_kv_heads=K)

    def extend(self, state: Any, k_BTKH, v_BTKH, positions_BT, form: AttentionForm) -> Any:
        if not isinstance(state, Flat):  # the prompt fitted into the capacity
            return super().extend(state, k_BTKH, v_BTKH, positions_BT, form)
        B, T, K, H = k_BTKH.shape
        held = state.slots.put(
            k_BTKH.reshape(B, T * K, 1, H),
            v_BTKH.reshape(B, T * K, 1, H),
            jnp.repeat(positions_BT, K, axis=1),
        )
        return dataclasses.replace(state, slots=held)

    def view(self, state: Any) -> KeyValues:
        if not isinstance(state, Flat):
            return super().view(state)
        seen = state.slots.view()
        heads_K = jnp.arange(state.num_kv_heads, dtype=jnp.int32)
        own_BKF = state.owner_BF[:, None] == heads_K[None, :, None]
        return dataclasses.replace(
            seen, positions_BS=jnp.where(own_BKF, seen.positions_BS[:, None], -1)
        )
