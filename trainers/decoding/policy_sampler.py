"""Continuations of prompts by a policy in training: one program for the weights of any step, compiled once.

Shapes: P prompts, T prompt length, G samples of a prompt, R = P G rows, M new tokens at most.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model.kv_cache.full import FullCache
from model.transforms import layer_stack
from trainers.decoding import decode
from trainers.decoding.decoder import repeated
from trainers.decoding.prefill import prefill
from trainers.decoding.settings import Settings


class PolicySampler:
    """Samples with the weights of any step, within their mesh.

    What follows a prompt is a function of the weights, the seed, the number of the round, the place of the prompt
    among all of the round and the number of the sample.

    Args:
      model: a decoder-only module, or an actor and critic.
      settings: what to generate, with samples of each prompt.
      sharding: of prompts, split evenly over its mesh.
      seed: of the draws.
    """

    def __init__(self, model: Any, settings: Settings, *, sharding: NamedSharding, seed: int):
        policy, copies = FullCache(), settings.num_samples
        written_by = model.inference_model
        room = max(settings.max_new_tokens - 1, 1)

        def sample(params, tokens_PT, lengths_P, active_P, number, first):
            params = model.inference_params(params)
            # Slices of stacked weights inside the loop would copy them for every token.
            unrolled = layer_stack.unrolled(written_by)
            params = layer_stack.unroll(params, written_by.config)
            logits_PV, caches = prefill(unrolled, params, policy, tokens_PT, lengths_P, room=room)
            rows = repeated((logits_PV, caches, lengths_P, active_P), copies)
            logits_RV, caches, lengths_R, active_R = rows
            key = jax.random.fold_in(jax.random.key(seed), number)
            index_R = first * copies + jnp.arange(len(lengths_R), dtype=jnp.uint32)
            keys_R = jax.vmap(jax.random.fold_in, (None, 0))(key, index_R)
            decoded, _ = decode.decode(
                unrolled, params, policy, logits_RV, caches, lengths_R, active_R, keys_R, settings
            )
            return decoded.tokens_BM, decoded.lengths_B

        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        self._sample = jax.jit(sample, out_shardings=everywhere)
        self._sharding = sharding
        self._ends = frozenset(settings.ends)

    def __call__(
        self,
        params: Any,
        tokens_PT: np.ndarray,
        lengths_P: np.ndarray,
        *,
        number: int,
        first: int = 0,
        active_P: np.ndarray | None = None,
    ) -> list[list[int]]:
        """Returns the tokens of R continuations, EOS included; continuations of one prompt are adjacent.

        Args:
          params: of the model.
          tokens_PT: prompts, padded at their ends; every process has all of them.
          lengths_P: their tokens.
          number: of the round, such as the step.
          first: index of the first of these prompts in the round.
          active_P: which are prompts, and not there to fill the batch; None for all.
        """
        active_P = np.ones_like(lengths_P, bool) if active_P is None else active_P
        rows = map(self._placed, (tokens_PT, lengths_P, active_P))
        arrays = self._sample(params, *rows, np.uint32(number), np.uint32(first))
        tokens_RM, counts_R = jax.device_get(arrays)
        return [row[:n].tolist() for row, n in zip(tokens_RM, counts_R, strict=True)]

    def ended(self, tokens: list[int]) -> bool:
        """Whether a continuation ended by itself."""
        return bool(tokens) and tokens[-1] in self._ends

    def _placed(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._sharding, lambda index: array[index])
