"""H2O's heavy hitters (Zhang et al., arXiv 2306.14048), chosen once, after the prompt.

Shapes: B batch, T queries, S slots, N query heads, K key/value heads, H head dim.
"""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp

from model.kv_cache import scores
from model.kv_cache.full import Reading
from model.kv_cache.scores import GroupVote
from model.kv_cache.selecting import Selecting, check_window
from model.kv_cache.slots import Slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Selecting):
    """Keeps recent tokens, and the tokens with the most attention summed over the prompt's queries.

    The paper also evicts one token for every new one. Here generated tokens are not evicted, as in
    comparisons with SnapKV. Attention is recomputed for a block of queries at a time.

    Attributes:
      capacity: slots per key/value head for the prompt, including recent tokens.
      window: number of recent tokens, which are always kept; None for half the capacity, as in the paper.
      group_vote: 'mean' or 'max' over the query heads of a key/value head.
    """

    window: int | None = None
    group_vote: GroupVote = "mean"

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None:
            check_window(self.capacity, self.window)
        if self.group_vote not in get_args(GroupVote):
            raise ValueError(
                f"group_vote = {self.group_vote!r} must be one of {get_args(GroupVote)}"
            )

    def no_evidence(self, held: Slots, num_heads: int) -> jax.Array:
        B, K, S, _ = held.k_BKSH.shape
        return jnp.zeros((B, K, num_heads // K, S), jnp.float32)

    def observe(self, state: Reading, q_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return state.evidence + scores.votes(q_BTNH, positions_BT, state.slots, state.known_form)

    def scores(self, state: Reading) -> jax.Array:
        votes_BKS = scores.of_group(state.evidence, self.group_vote)
        window = self.capacity // 2 if self.window is None else self.window
        return scores.ranked(votes_BKS, state.positions_BS, window)
