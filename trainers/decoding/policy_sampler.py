"""Samples continuations of prompts from a policy in training; one program serves the weights of all steps.

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
    """Samples continuations with the weights of any step; calls must be within their mesh.

    A continuation is a function of the weights, the seed, the number of the round, the index of the prompt in the
    round and the number of the sample.

    Args:
      model: a decoder-only module, or an actor-critic model.
      settings: settings of generation, including the number of samples per prompt.
      sharding: sharding of the prompts, which must divide evenly over its mesh.
      seed: seed of the draws.
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
        """Returns the tokens of R continuations, including EOS; continuations of one prompt are adjacent.

        Args:
          params: parameters of the model.
          tokens_PT: prompts, padded on the right; every process has all of them.
          lengths_P: lengths of the prompts.
          number: number of the round, such as the step.
          first: index in the round of the first of these prompts.
          active_P: False for rows that only fill the batch; None if all rows are prompts.
        """
        active_P = np.ones_like(lengths_P, bool) if active_P is None else active_P
        rows = map(self._placed, (tokens_PT, lengths_P, active_P))
        arrays = self._sample(params, *rows, np.uint32(number), np.uint32(first))
        tokens_RM, counts_R = jax.device_get(arrays)
        return [row[:n].tolist() for row, n in zip(tokens_RM, counts_R, strict=True)]

    def ended(self, tokens: list[int]) -> bool:
        """Returns whether a continuation ends with an EOS token."""
        return bool(tokens) and tokens[-1] in self._ends

    def _placed(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._sharding, lambda index: array[index])
