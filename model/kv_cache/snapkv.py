"""SnapKV (Li et al., arXiv 2404.14469): the last queries of a prompt vote for the tokens to keep.

Two methods share its votes out differently. PyramidKV (Cai et al., arXiv 2406.02069) has more slots in shallow layers than
in deep. In Ada-KV (Feng et al., arXiv 2407.11550) the heads of a layer share its slots according to their votes.

Shapes: B batch, T new tokens, S slots of the prompt, C slots of a head (on average), F slots of all heads together, N query
heads, K key/value heads, G query heads of each, H head dim.
"""

import dataclasses
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from espalier.model.kv_cache import selecting
from espalier.model.kv_cache.base import AttentionForm, KeyValues
from espalier.model.kv_cache.full import Reading
from espalier.model.kv_cache.selecting import GroupVote, Voted, check_choice, check_window
from espalier.model.kv_cache.slots import Slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Voted):
    """Keeps the last `window` tokens, and the earlier tokens that they attend to most.

    The votes are the window's attention weights (softmax over all keys), summed over its queries
    (equation 2). The votes of the query heads of a key/value head are combined, and votes are pooled along
    the prompt. Every key/value head keeps the tokens with its highest votes (equation 3). All computations
    are in float32. The defaults are the paper's for LongBench.

    Attributes:
      window: number of last tokens, which vote and are always kept. It should be longer than the text
        that a chat template adds after the question; otherwise the question has no vote.
      group_vote: 'mean' or 'max' over the query heads of a key/value head, before pooling.

    Raises:
      ValueError: a window outside [1, capacity), an even kernel, or an unknown name.
    """

    window: int = 32
    kernel: int = 7
    group_vote: GroupVote = "mean"

    def __post_init__(self):
        super().__post_init__()
        check_window(self.capacity, self.window)
        check_choice(self, "group_vote", GroupVote)

    @property
    def observed(self) -> int:
        return self.window

    def scores(self, state: Reading) -> jax.Array:
        seen = state.evidence
        votes_BKGS = selecting.votes(seen.q_BWNH, seen.positions_BW, state.slots, state.known_form)
        votes_BKS = selecting.of_group(votes_BKGS, self.group_vote)
        return self.pooled_scores(votes_BKS, state, self.window)


_Tokens = TypeVar("_Tokens", int, np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall linearly with depth; layers keep `capacity` tokens of a row on average.

    Budgets are computed per row and do not depend on padding. No budget exceeds the tokens of the row, so
    the budgets of a short row vary less with depth, and a row that fits into the capacity is kept whole.
    For such rows deep layers also need `capacity` slots, so this uses up to 5/4 of SnapKV's slots.

    Attributes:
      beta: the deepest layer keeps (capacity - window) / beta tokens before the window.
    """

    beta: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta = {self.beta} must be at least 1")

    @property
    def average(self) -> int:
        """The mean number of tokens that a layer keeps before the window."""
        return self.capacity - self.window

    @property
    def steepest(self) -> int:
        """The number of tokens that the first layer keeps before the window, for sufficiently long rows."""
        return 2 * self.average - int(self.average / self.beta + 0.5)

    def most(self, state: Reading) -> int:
        longest = min(max(state.slots.length - self.window, self.average), self.steepest)
        any_row = np.arange(self.average, longest + 1)
        return self.window + int(self._budget(any_row, state).max())

    def chosen(self, state: Reading, budget: int, *, length: int, dtype: Any) -> Slots:
        held, S = state.slots, state.slots.length
        before_B = state.positions_BS.max(1) + 1 - self.window
        first_B = jnp.clip(before_B, self.average, self.steepest)
        count_B = self.window + self._budget(first_B, state)
        index_BKC = jax.lax.top_k(self.scores(state), budget)[1]
        wanted_BC = jnp.arange(budget, dtype=jnp.int32)[None] < count_B[:, None]
        index_BKC = jnp.sort(jnp.where(wanted_BC[:, None], index_BKC, S), axis=-1)
        held = held.take(jnp.minimum(index_BKC, S - 1))
        held = dataclasses.replace(
            held, positions_BXS=jnp.where(index_BKC < S, held.positions_BXS, -1)
        )
        return held.stored_as(dtype).with_room(length).constrained()

    def _budget(self, first: _Tokens, state: Reading) -> _Tokens:
        return layer_budget(
            first, average=self.average, layer=state.layer, num_layers=state.num_layers
        )


def layer_budget(first: _Tokens, *, average: int, layer: int, num_layers: int) -> _Tokens:
    """Returns the number of tokens that a layer keeps.

    It falls linearly from `first` in layer 0 to 2 * average - first in the last layer; the sum over
    layers is average * num_layers.
    """
    if num_layers == 1:
        return first * 0 + average
    excess = first - average

    # Cumulative sums are rounded, not the terms, so that the total is exact.
    def total(layers: int) -> _Tokens:
        return layers * first - excess * (layers * (layers - 1)) // (num_layers - 1)

    return total(layer + 1) - total(layer)


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
        index_BF = selecting.best(scores_BKS.reshape(B, 1, K * S), F)[:, 0]
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
