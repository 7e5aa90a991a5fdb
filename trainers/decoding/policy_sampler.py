"""Samples continuations of prompts from a policy in training; one program serves the weights of all steps.

Shapes: P prompts, T prompt length, G samples of a prompt, R = P G rows, M new tokens at most.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from espalier.model import rows
from espalier.model.kv_cache.full import FullCache
from espalier.model.protocol import inference_model, inference_params
from espalier.model.transforms import layer_stack
from espalier.trainers.decoding import decode
from espalier.trainers.decoding.buckets import bucket_length, padded
from espalier.trainers.decoding.prefill import prefill, repeated
from espalier.trainers.decoding.settings import Settings


class PolicySampler:
    """Samples continuations with the weights of any step; calls must be within their mesh.

    A continuation is a function of the weights, the seed, the number of the round, the index of the prompt in the
    round and the number of the sample.

    Args:
      model: a language model, or an actor-critic model.
      settings: settings of generation, including the number of samples per prompt.
      sharding: sharding of the prompts, which must divide evenly over its mesh.
    """

    def __init__(self, model: Any, settings: Settings, *, sharding: NamedSharding, seed: int):
        policy, copies = FullCache(), settings.num_samples
        written_by = inference_model(model)
        room = max(settings.max_new_tokens - 1, 1)

        def sample(params, tokens_PT, lengths_P, active_P, number, first):
            params = inference_params(model, params)
            # Slices of stacked weights inside the loop would copy them for every token.
            unrolled = layer_stack.unrolled(written_by)
            params = layer_stack.unroll(params, written_by.config)
            columns, tokens_PT, lengths_P = unrolled.row.begun(tokens_PT, lengths_P)
            context = unrolled.row_context({"params": params}, columns)
            with rows.given(context):
                logits_PV, caches = prefill(
                    *(unrolled, params, policy, tokens_PT, lengths_P),
                    room=room,
                    encoder=rows.encoder_arguments(columns),
                )
            of_prompts = (logits_PV, caches, lengths_P, active_P, context)
            logits_RV, caches, lengths_R, active_R, context = repeated(of_prompts, copies)
            key = jax.random.fold_in(jax.random.key(seed), number)
            index_R = first * copies + jnp.arange(len(lengths_R), dtype=jnp.uint32)
            keys_R = jax.vmap(jax.random.fold_in, (None, 0))(key, index_R)
            own_R = (lengths_R, active_R, keys_R)
            with rows.given(context):
                decoded, _ = decode.decode(
                    unrolled, params, policy, logits_RV, caches, *own_R, settings
                )
            return decoded.tokens_BM, decoded.lengths_B

        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        self._sample = jax.jit(sample, out_shardings=everywhere)
        self._sharding = sharding
        self._ends = frozenset(settings.eos_ids)

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
          tokens_PT: prompts, padded on the right; every process has all of them. The first token of an encoder-decoder's is
            the one that the continuation follows, and the encoder reads the others.
          number: number of the round, such as the step.
          first: index in the round of the first of these prompts.
          active_P: False for rows that only fill the batch; None if all rows are prompts.
        """
        active_P = np.ones_like(lengths_P, bool) if active_P is None else active_P
        prompts = [placed(array, self._sharding) for array in (tokens_PT, lengths_P, active_P)]
        arrays = self._sample(params, *prompts, np.uint32(number), np.uint32(first))
        tokens_RM, counts_R = jax.device_get(arrays)
        return [row[:n].tolist() for row, n in zip(tokens_RM, counts_R, strict=True)]

    def ended(self, tokens: list[int]) -> bool:
        """Returns whether a continuation ends with an EOS token."""
        return bool(tokens) and tokens[-1] in self._ends


def placed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns a global array; `array` is the whole array in every process."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class Generator:
    """Continues the same prompts, once each, with the weights of any step; all batches have one shape.

    Args:
      model, sharding, seed: see `PolicySampler`.
      prompts: token ids including the start token; at least one token each.
      settings: settings of generation, with one sample per prompt.
      batch_size: rows at a time, a multiple of the mesh's parts of a batch.
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
        self._max_length, self._max_new_tokens = model.max_length, settings.max_new_tokens
        self._prompts, self._batch_size = prompts, batch_size
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
          step: number of updates so far, the round of the draws.
          done: called after each batch.

        Raises:
          ValueError: prompt and output are longer than the model's learned positions.
        """
        limit, longest = self._max_length, max(map(len, self._prompts))
        if limit is not None and longest + self._max_new_tokens - 1 > limit:
            raise ValueError(
                f"A held-out prompt has {longest} tokens; with {self._max_new_tokens} new ones it is longer than the "
                f"{limit} positions that the model has learned. Lower max_new_tokens."
            )
        length = bucket_length(longest, limit=limit)
        outputs: list[list[int]] = []
        for first in range(0, len(self._prompts), self._batch_size):
            batch = self._prompts[first : first + self._batch_size]
            tokens_BT, lengths_B = padded(batch, self._batch_size, length)
            active_B = np.arange(self._batch_size) < len(batch)
            continued = self._sampler(
                params, tokens_BT, lengths_B, active_P=active_B, number=step, first=first
            )
            outputs += continued[: len(batch)]
            done()
        return outputs
