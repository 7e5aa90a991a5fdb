"""Outputs of a policy in training: the same prompts at every evaluation, by one compiled program.

Shapes: B rows, T prompt length, M new tokens at most.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model.kv_cache.full import FullCache
from model.surgery import layer_stack
from trainers import decode
from trainers.buckets import bucket_length, longest_row
from trainers.prefill import prefill


class Generator:
    """Continues its prompts with the weights of any step.

    All batches have one shape, so that nothing is compiled after the first. A continuation is a function of the
    weights, the seed, the step and the index of its prompt.

    Args:
      model: a decoder-only module.
      prompts: as the model reads them, each with a token at least.
      settings: what to generate, one sample each.
      batch_size: rows at a time, of which the mesh has equal parts.
      sharding: of the rows of a batch.
      seed: of the draws.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        settings: decode.Settings,
        *,
        batch_size: int,
        sharding: NamedSharding,
        seed: int,
    ):
        self._prompts = prompts
        self._settings = settings
        self._batch_size = batch_size
        self._sharding = sharding
        # Slices of stacked weights inside the loop would copy them for every token.
        unrolled, policy = layer_stack.unrolled(model), FullCache()
        room = max(settings.max_new_tokens - 1, 1)

        def generate(params, tokens_BT, lengths_B, active_B, index_B, step):
            params = layer_stack.unroll(params, model.config)
            logits_BV, caches = prefill(unrolled, params, policy, tokens_BT, lengths_B, room=room)
            key = jax.random.fold_in(jax.random.key(seed), step)
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)
            decoded, _ = decode.decode(
                unrolled, params, policy, logits_BV, caches, lengths_B, active_B, keys_B, settings
            )
            return decoded.tokens_BM, decoded.lengths_B

        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        self._generate = jax.jit(generate, out_shardings=everywhere)

    @property
    def batches(self) -> int:
        """Batches of one evaluation."""
        return -(-len(self._prompts) // self._batch_size)

    def __call__(
        self, params: Any, step: int, *, done: Callable[[], None] = lambda: None
    ) -> list[list[int]]:
        """The tokens that follow each prompt, with the one that ended them.

        Args:
          params: of the model.
          step: updates made.
          done: called after each batch.

        Raises:
          ValueError: a prompt leaves too little room within the positions that the model has learned.
        """
        limit = longest_row(params)
        longest = max(map(len, self._prompts))
        if limit is not None and longest + self._settings.max_new_tokens - 1 > limit:
            raise ValueError(
                f"A held-out prompt has {longest} tokens; with {self._settings.max_new_tokens} new ones it is longer "
                f"than the {limit} positions that the model has learned. Lower max_new_tokens."
            )
        length = bucket_length(longest, limit=limit)
        found: list[list[int]] = []
        for first in range(0, len(self._prompts), self._batch_size):
            batch = self._prompts[first : first + self._batch_size]
            tokens_BT = np.zeros((self._batch_size, length), np.int32)
            lengths_B = np.ones(self._batch_size, np.int32)
            for b, prompt in enumerate(batch):
                tokens_BT[b, : len(prompt)] = prompt
                lengths_B[b] = len(prompt)
            index_B = np.arange(first, first + self._batch_size, dtype=np.uint32)
            active_B = index_B < len(self._prompts)
            rows = jax.device_put((tokens_BT, lengths_B, active_B, index_B), self._sharding)
            tokens_BM, counts_B = jax.device_get(self._generate(params, *rows, np.uint32(step)))
            found += [tokens_BM[b, : counts_B[b]].tolist() for b in range(len(batch))]
            done()
        return found
