"""TOVA (Oren et al., arXiv 2401.06104): the last query's attention decides, for all heads alike.

Shapes: B batch, S slots, K key/value heads, G query heads of each.
"""

import dataclasses

import jax

from model.kv_cache import scores
from model.kv_cache.full import Reading
from model.kv_cache.selecting import Selecting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tova(Selecting):
    """The tokens that the last one attends to most on average over heads, and itself.

    The paper evicts during generation too; here only the prompt is compressed.

    Attributes:
      capacity: slots for the prompt.
    """

    @property
    def observed(self) -> int:
        return 1

    def scores(self, state: Reading) -> jax.Array:
        seen = state.evidence
        votes_BKGS = scores.votes(seen.q_BWNH, seen.positions_BW, state.slots, state.known_form)
        return scores.ranked(votes_BKGS.mean((1, 2))[:, None], state.positions_BS, window=1)
