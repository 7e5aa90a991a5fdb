"""PyramidKV (Cai et al., arXiv 2406.02069): SnapKV with more slots in shallow layers than in deep.

Shapes: B batch, S slots, C slots chosen, K key/value heads.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from espalier.model.kv_cache.full import Reading
from espalier.model.kv_cache.slots import Slots
from espalier.model.kv_cache.snapkv import SnapKV

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
