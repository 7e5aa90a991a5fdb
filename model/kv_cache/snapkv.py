"""SnapKV (Li et al., arXiv 2404.14469): the last queries of a prompt vote for the tokens to keep.

Shapes: B batch, S slots, K key/value heads, G query heads of each.
"""

import dataclasses

import jax

from espalier.model.kv_cache import scores
from espalier.model.kv_cache.full import Reading
from espalier.model.kv_cache.scores import GroupVote, Pooling
from espalier.model.kv_cache.selecting import Selecting, check_choice, check_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Selecting):
    """Keeps the last `window` tokens, and the earlier tokens that they attend to most.

    The votes are the window's attention weights (softmax over all keys), summed over its queries
    (equation 2). The votes of the query heads of a key/value head are combined, and votes are pooled along
    the prompt. Every key/value head keeps the tokens with its highest votes (equation 3). All computations
    are in float32. The defaults are the paper's for LongBench.

    Attributes:
      window: number of last tokens, which vote and are always kept. It should be longer than the text
        that a chat template adds after the question; otherwise the question has no vote.
      kernel: odd width of the pooling; 1 for none.
      pooling: 'max' or 'average'.
      group_vote: 'mean' or 'max' over the query heads of a key/value head, before pooling.

    Raises:
      ValueError: a window outside [1, capacity), an even kernel, or an unknown name.
    """

    window: int = 32
    kernel: int = 7
    pooling: Pooling = "max"
    group_vote: GroupVote = "mean"

    def __post_init__(self):
        super().__post_init__()
        check_window(self.capacity, self.window)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel = {self.kernel} must be odd and positive")
        check_choice(self, "pooling", Pooling)
        check_choice(self, "group_vote", GroupVote)

    @property
    def observed(self) -> int:
        return self.window

    def scores(self, state: Reading) -> jax.Array:
        seen, at_BS = state.evidence, state.positions_BS
        votes_BKGS = scores.votes(seen.q_BWNH, seen.positions_BW, state.slots, state.known_form)
        votes_BKS = scores.of_group(votes_BKGS, self.group_vote)
        prefix_BS = (at_BS >= 0) & ~scores.recent(at_BS, self.window)
        votes_BKS = scores.pooled(votes_BKS, prefix_BS, self.kernel, self.pooling)
        return scores.ranked(votes_BKS, at_BS, self.window)
