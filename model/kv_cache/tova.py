"""TOVA (Oren et al., arXiv 2401.06104): the last query's attention selects the same tokens for all heads.

Shapes: B batch, S slots, K key/value heads, G query heads of each.
"""

import dataclasses

import jax

from model.kv_cache import scores
from model.kv_cache.full import Reading
from model.kv_cache.selecting import Selecting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tova(Selecting):
    """Keeps the last token, and the tokens that it attends to most on average over heads.

    The paper also evicts tokens during generation; here only the prompt is compressed.

    Attributes:
      capacity: slots per key/value head for the prompt.
    """

    @property
    def observed(self) -> int:
        return 1

    def scores(self, state: Reading) -> jax.Array:
        seen = state.evidence
        votes_BKGS = scores.votes(seen.q_BWNH, seen.positions_BW, state.slots, state.known_form)
        return scores.ranked(votes_BKGS.mean((1, 2))[:, None], state.positions_BS, window=1)
