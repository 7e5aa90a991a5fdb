"""A control that keeps random tokens.

Shapes: B batch, S slots, K key/value heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from model.kv_cache import scores
from model.kv_cache.full import Reading
from model.kv_cache.selecting import Selecting, check_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Selecting):
    """Keeps the last `window` tokens and random earlier tokens: a baseline that any method must beat.

    The choice depends only on seed, layer, head and position, not on the batch or on padding.

    Attributes:
      capacity: slots per key/value head for the prompt, including the window.
      window: number of last tokens, which are always kept.
      seed: seed of the random choice.
    """

    window: int = 32
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_window(self.capacity, self.window)

    def scores(self, state: Reading) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(self.seed), state.layer)
        heads = (state.slots.k_BKSH.shape[1],)
        keys_BS = jax.vmap(jax.vmap(lambda at: jax.random.fold_in(key, at)))(
            jnp.maximum(state.positions_BS, 0)
        )
        drawn_BSK = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, heads)))(keys_BS)
        return scores.ranked(drawn_BSK.swapaxes(1, 2), state.positions_BS, self.window)
