"""Readings of completions after their prompts, with the weights of any step.

Shapes: B rows, T length, D width.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from trainers.decoding.buckets import batches_by_length
from trainers.preference.indicators.token_readings import TOP_K, TokenReadings, read_tokens
from trainers.scoring.scoring import Row

_SHORTEST = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readings:
    """Of one completion.

    Attributes:
      log_prob: natural logarithm of its probability.
      length: its tokens.
      entropy, mass: of the likeliest tokens, means over its tokens (see token_readings.py).
    """

    log_prob: float
    length: int
    entropy: float
    mass: float

    @property
    def mean_log_prob(self) -> float:
        """Per token."""
        return self.log_prob / self.length


class Reader:
    """Reads completions in batches of similar length; compiles once for each of a few lengths, powers of two.

    Args:
      model: a decoder-only module.
      batch_size: rows at a time, of which the mesh has equal parts.
      sharding: of the rows of a batch.
      k: tokens that count as the likeliest.
    """

    def __init__(self, model: Any, *, batch_size: int, sharding: NamedSharding, k: int = TOP_K):
        self._max_length = model.max_length
        self._batch_size = batch_size
        self._sharding = sharding

        def read(
            params: Any, tokens_BT: jax.Array, targets_BT: jax.Array, lengths_B: jax.Array
        ) -> TokenReadings:
            segments_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
            out = model.apply(
                {"params": params},
                tokens_BT,
                segments_BT=segments_BT.astype(jnp.int32),
                method="hidden",
            )
            found = read_tokens(
                out.hidden_BTD.reshape(-1, out.hidden_BTD.shape[-1]),
                model.apply({"params": params}, method="head_VD"),
                targets_BT.reshape(-1),
                k=k,
                logit_scale=model.logit_scale,
                softcap=model.logit_softcap,
            )
            return jax.tree.map(lambda x: x.reshape(tokens_BT.shape), found)

        self._read = jax.jit(read, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))

    def batches(self, count: int) -> int:
        """Batches of so many sequences."""
        return -(-count // self._batch_size)

    def __call__(
        self,
        params: Any,
        sequences: Sequence[Row],
        *,
        done: Callable[[], None] = lambda: None,
    ) -> list[Readings]:
        """Readings of sequences, in their order.

        Args:
          params: of the model.
          sequences: each with a context, and at least one target.
          done: called after each batch.

        Raises:
          ValueError: a sequence longer than the positions that the model has learned.
        """
        limit = self._max_length
        # The last target is predicted, but never read.
        lengths = [len(one.context) + len(one.targets) - 1 for one in sequences]
        if limit is not None and max(lengths, default=0) > limit:
            raise ValueError(
                f"A held-out pair or a prompt with what follows has {max(lengths)} tokens, but the model learned "
                f"only {limit} positions. Lower max_new_tokens, or the max_length of the held-out pairs."
            )
        found: dict[int, Readings] = {}
        for batch in batches_by_length(lengths, self._batch_size):
            longest = max(_SHORTEST, 1 << (lengths[batch[0]] - 1).bit_length())
            longest = longest if limit is None else min(longest, limit)
            tokens_BT, targets_BT = np.zeros((2, self._batch_size, longest), np.int32)
            lengths_B = np.ones(self._batch_size, np.int32)
            for b, i in enumerate(batch):
                text = [*sequences[i].context, *sequences[i].targets]
                tokens_BT[b, : lengths[i]], targets_BT[b, : lengths[i]] = text[:-1], text[1:]
                lengths_B[b] = lengths[i]
            arrays = jax.device_put((tokens_BT, targets_BT, lengths_B), self._sharding)
            readings: TokenReadings = jax.device_get(self._read(params, *arrays))
            for b, i in enumerate(batch):
                places = slice(len(sequences[i].context) - 1, lengths[i])
                found[i] = Readings(
                    log_prob=float(readings.log_probs[b, places].sum(dtype=np.float64)),
                    length=len(sequences[i].targets),
                    entropy=float(readings.entropies[b, places].mean(dtype=np.float64)),
                    mass=float(readings.masses[b, places].mean(dtype=np.float64)),
                )
            done()
        return [found[i] for i in range(len(sequences))]
