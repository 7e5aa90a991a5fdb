"""Outputs of a policy for the same prompts at every evaluation. Shapes: B rows, T prompt length."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from trainers.decoding.buckets import bucket_length
from trainers.decoding.policy_sampler import PolicySampler
from trainers.decoding.settings import Settings


class Generator:
    """Continues its prompts with the weights of any step.

    All batches have the same shape, so only the first compiles. A continuation is a function of the weights, the seed,
    the step and the index of its prompt.

    Args:
      model: a decoder-only module.
      prompts: token ids including the start token; at least one token each.
      settings: settings of generation, with one sample per prompt.
      batch_size: rows at a time, a multiple of the mesh's parts of a batch.
      sharding: of the rows of a batch.
      seed: seed of sampling.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        *,
        batch_size: int,
        sharding: NamedSharding,
        seed: int,
    ):
        self._max_length = model.max_length
        self._prompts = prompts
        self._settings = settings
        self._batch_size = batch_size
        self._sampler = PolicySampler(model, settings, sharding=sharding, seed=seed)

    @property
    def batches(self) -> int:
        """Number of batches of one evaluation."""
        return -(-len(self._prompts) // self._batch_size)

    def __call__(
        self, params: Any, step: int, *, done: Callable[[], None] = lambda: None
    ) -> list[list[int]]:
        """Returns the generated tokens of each prompt, including the end token.

        Args:
          params: parameters of the model.
          step: number of updates so far.
          done: called after each batch.

        Raises:
          ValueError: prompt and output are longer than the model's learned positions.
        """
        limit = self._max_length
        longest = max(map(len, self._prompts))
        if limit is not None and longest + self._settings.max_new_tokens - 1 > limit:
            raise ValueError(
                f"A held-out prompt has {longest} tokens; with {self._settings.max_new_tokens} new ones it is longer "
                f"than the {limit} positions that the model has learned. Lower max_new_tokens."
            )
        length = bucket_length(longest, limit=limit)
        outputs: list[list[int]] = []
        for first in range(0, len(self._prompts), self._batch_size):
            batch = self._prompts[first : first + self._batch_size]
            tokens_BT = np.zeros((self._batch_size, length), np.int32)
            lengths_B = np.ones(self._batch_size, np.int32)
            for b, prompt in enumerate(batch):
                tokens_BT[b, : len(prompt)] = prompt
                lengths_B[b] = len(prompt)
            active_B = np.arange(self._batch_size) < len(batch)
            written = self._sampler(
                params, tokens_BT, lengths_B, active_P=active_B, number=step, first=first
            )
            outputs += written[: len(batch)]
            done()
        return outputs
