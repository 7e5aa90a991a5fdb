"""Prompts in, continuations out: batches, compiled programs and what they cost.

Shapes: B batch, T prompt length, M new tokens at most.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from model.kv_cache.base import CachePolicy
from model.kv_cache.full import FullCache
from model.surgery import layer_stack
from trainers.buckets import batches_by_length, bucket_length, longest_row
from trainers.decode import Settings, generate, prefill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """What followed one prompt: tokens, EOS included, and the model's log-probability of each."""

    tokens: list[int]
    log_probs: list[float]


@dataclasses.dataclass
class Stats:
    """What generating took: seconds apart from compiling, and the caches of the largest batch."""

    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    cache_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Decoder:
    """Continues prompts in batches of similar length; compiles once for each of a few lengths.

    A prompt's continuation depends on the seed and on its index among the prompts, not on the batch
    it happens to be in.

    Args:
      model: a decoder-only module, layers scanned or unrolled.
      params: its parameters.
      settings: what to generate.
      policy: of the key/value caches.
      batch_size: prompts at a time.
      sharding: of the rows of a batch, to be used within its mesh; None on one device.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        settings: Settings,
        *,
        policy: CachePolicy | None = None,
        batch_size: int = 8,
        sharding: NamedSharding | None = None,
    ):
        config = model.config
        # Slices of stacked weights inside the loop would copy them for every token.
        self._model = layer_stack.unrolled(model)
        self._params = jax.jit(lambda params: layer_stack.unroll(params, config))(params)
        self._settings = settings
        self._policy = FullCache() if policy is None else policy
        self._batch_size = batch_size
        self._sharding = sharding
        self._programs: dict[int, Callable] = {}
        self.stats = Stats()

    def __call__(self, prompts: Sequence[Sequence[int]], *, seed: int = 0) -> list[Continuation]:
        """Continuations in the order of the prompts.

        Raises:
          ValueError: an empty prompt, or one that leaves no room within learned positions.
        """
        limit = longest_row(self._params)
        room = self._settings.max_new_tokens - 1
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"Prompt {i} is empty: there is nothing to continue.")
            if limit is not None and len(prompt) + room > limit:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens; with {room + 1} new ones it is longer than "
                    f"the {limit} positions that the model has learned. Lower max_new_tokens."
                )
        lengths = [len(prompt) for prompt in prompts]
        found: dict[int, Continuation] = {}
        batches = batches_by_length(lengths, self._batch_size)
        for batch in tqdm(batches, desc="generate", unit="batch", disable=None):
            length = bucket_length(lengths[batch[0]], limit=limit)
            for i, row in zip(batch, self._batch(prompts, batch, length, seed), strict=True):
                found[i] = row
        return [found[i] for i in range(len(prompts))]

    def _batch(
        self, prompts: Sequence[Sequence[int]], batch: Sequence[int], length: int, seed: int
    ) -> list[Continuation]:
        tokens_BT = np.zeros((self._batch_size, length), np.int32)
        lengths_B = np.ones(self._batch_size, np.int32)
        active_B = np.zeros(self._batch_size, bool)
        index_B = np.zeros(self._batch_size, np.uint32)
        for b, i in enumerate(batch):
            tokens_BT[b, : len(prompts[i])] = prompts[i]
            lengths_B[b], active_B[b], index_B[b] = len(prompts[i]), True, i
        arrays = jax.device_put((tokens_BT, lengths_B, active_B, index_B), self._sharding)
        program = self._program(length, arrays)
        began = time.perf_counter()
        decoded = jax.device_get(program(self._params, *arrays, np.uint32(seed)))
        counts = decoded.lengths_B[: len(batch)].tolist()
        self.stats.seconds += time.perf_counter() - began
        self.stats.tokens += sum(counts)
        return [
            Continuation(
                tokens=decoded.tokens_BM[b, :count].tolist(),
                log_probs=decoded.log_probs_BM[b, :count].tolist(),
            )
            for b, count in enumerate(counts)
        ]

    def _program(self, length: int, arrays: tuple[jax.Array, ...]) -> Callable:
        """The compiled loop for prompts of a length, compiled apart so that it can be timed apart."""
        if length in self._programs:
            return self._programs[length]
        began = time.perf_counter()
        model, policy, settings = self._model, self._policy, self._settings

        def run(params, tokens_BT, lengths_B, active_B, index_B, seed):
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index_B)
            return generate(model, params, policy, tokens_BT, lengths_B, active_B, keys_B, settings)

        mesh = None if self._sharding is None else self._sharding.mesh
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        jitted = jax.jit(run, out_shardings=whole)
        program = jitted.lower(self._params, *arrays, np.uint32(0)).compile()
        self._programs[length] = program
        room = max(settings.max_new_tokens - 1, 1)
        _, caches = jax.eval_shape(
            lambda params, tokens, lengths: prefill(
                model, params, policy, tokens, lengths, room=room
            ),
            self._params,
            *arrays[:2],
        )
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
        self.stats.cache_bytes = max(self.stats.cache_bytes, size)
        self.stats.compile_seconds += time.perf_counter() - began
        return program
