"""Prompts in, continuations out: batches, compiled programs and what they cost.

Shapes: B batch, T prompt length, M new tokens at most.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from model.kv_cache.base import CachePolicy
from model.kv_cache.full import FullCache
from model.surgery import layer_stack
from trainers.buckets import batches_by_length, bucket_length, in_order, longest_row
from trainers.decode import Decoded, Settings, decode
from trainers.prefill import prefill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """What followed one prompt: tokens, EOS included, and the model's log-probability of each."""

    tokens: list[int]
    log_probs: list[float]


@dataclasses.dataclass
class Stats:
    """What generating took.

    Attributes:
      prompt_tokens, new_tokens: read and generated.
      prefill_seconds, decode_seconds: reading prompts and generating, compilation apart.
      compile_seconds: of all programs.
      cache_bytes: of keys and values of the largest batch while decoding.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    cache_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of prefill and decoding."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.new_tokens / seconds if seconds else 0.0


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
        self._programs: dict[tuple[str, int], Callable] = {}
        self.stats = Stats()

    def __call__(self, prompts: Sequence[Sequence[int]], *, seed: int = 0) -> list[Continuation]:
        """Continuations in the order of the prompts; errors as of `stream`."""
        return list(self.stream(prompts, seed=seed))

    def stream(self, prompts: Sequence[Sequence[int]], *, seed: int = 0) -> Iterator[Continuation]:
        """What calling it returns, one by one as they are done.

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
        return in_order(self._batches(prompts, seed, limit))

    def _batches(
        self, prompts: Sequence[Sequence[int]], seed: int, limit: int | None
    ) -> Iterator[tuple[int, Continuation]]:
        """(index, continuation) of each prompt, batch by batch."""
        lengths = [len(prompt) for prompt in prompts]
        batches = batches_by_length(lengths, self._batch_size)
        for batch in tqdm(
            batches, desc="generate", unit="batch", disable=True if len(batches) == 1 else None
        ):
            length = bucket_length(lengths[batch[0]], limit=limit)
            yield from zip(batch, self._batch(prompts, batch, length, seed), strict=True)

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
        tokens_BT, lengths_B, active_B, index_B = jax.device_put(
            (tokens_BT, lengths_B, active_B, index_B), self._sharding
        )
        logits_BV, caches = self._prefill(length, tokens_BT, lengths_B)
        decoded = self._decode(
            length, logits_BV, caches, lengths_B, active_B, index_B, np.uint32(seed)
        )
        counts = decoded.lengths_B[: len(batch)].tolist()
        self.stats.prompt_tokens += sum(len(prompts[i]) for i in batch)
        self.stats.new_tokens += sum(counts)
        return [
            Continuation(
                tokens=decoded.tokens_BM[b, :count].tolist(),
                log_probs=decoded.log_probs_BM[b, :count].tolist(),
            )
            for b, count in enumerate(counts)
        ]

    def _prefill(self, length: int, *arrays: jax.Array) -> tuple[jax.Array, Any]:
        model, policy = self._model, self._policy
        room = max(self._settings.max_new_tokens - 1, 1)

        def run(params, tokens_BT, lengths_B):
            return prefill(model, params, policy, tokens_BT, lengths_B, room=room)

        program = self._compiled("prefill", length, jax.jit(run), *arrays)
        began = time.perf_counter()
        logits_BV, caches = jax.block_until_ready(program(self._params, *arrays))
        self.stats.prefill_seconds += time.perf_counter() - began
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
        self.stats.cache_bytes = max(self.stats.cache_bytes, size)
        return logits_BV, caches

    def _decode(self, length: int, *arrays: Any) -> Decoded:
        model, policy, settings = self._model, self._policy, self._settings

        def run(params, logits_BV, caches, lengths_B, active_B, index_B, seed):
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index_B)
            return decode(
                model, params, policy, logits_BV, caches, lengths_B, active_B, keys_B, settings
            )

        whole = None
        if self._sharding is not None:  # every process gets all rows
            whole = NamedSharding(self._sharding.mesh, PartitionSpec())
        jitted = jax.jit(run, donate_argnums=2, out_shardings=(whole, None))
        program = self._compiled("decode", length, jitted, *arrays)
        began = time.perf_counter()
        decoded = jax.device_get(program(self._params, *arrays)[0])
        self.stats.decode_seconds += time.perf_counter() - began
        return decoded

    def _compiled(self, name: str, length: int, function: Any, *arrays: Any) -> Callable:
        """The program for prompts of a length, compiled apart so that it can be timed apart."""
        if (name, length) not in self._programs:
            began = time.perf_counter()
            self._programs[name, length] = function.lower(self._params, *arrays).compile()
            self.stats.compile_seconds += time.perf_counter() - began
        return self._programs[name, length]
