"""Log-probabilities of tokens after a context. Shapes: B batch, T length."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from trainers.decoding.buckets import batches_by_length, bucket_length, in_order
from trainers.objectives.forward import frozen_forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Target tokens to score, and the context tokens before them, at least one."""

    context: Sequence[int]
    targets: Sequence[int]


class Scorer:
    """Scores rows in batches of similar length; compiles once for each of a few lengths.

    Args:
      model: a decoder-only module.
      params: the model's parameters.
      batch_size: number of rows in a batch.
      sharding: sharding of a batch's rows; calls must be within its mesh. None on one device.
    """

    def __init__(
        self, model: Any, params: Any, *, batch_size: int, sharding: NamedSharding | None = None
    ):
        self._params = params
        self._max_length = model.max_length
        self._batch_size = batch_size
        self._sharding = sharding
        whole = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
        self._log_probs = jax.jit(
            lambda params, batch: frozen_forward(model, params, batch).log_probs_BT(),
            out_shardings=whole,
        )

    def __call__(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Returns the log-probability of every target of each row, float32; raises the errors of `stream`."""
        return list(self.stream(rows))

    def stream(self, rows: Sequence[Row]) -> Iterator[np.ndarray]:
        """Yields the log-probabilities of each row, in the order of the rows.

        Raises:
          ValueError: a row has no context, or is longer than the model's learned positions.
        """
        limit = self._max_length
        for i, row in enumerate(rows):
            # The last target is predicted but not read.
            length = len(row.context) + len(row.targets) - 1
            if not len(row.context):
                raise ValueError(f"Row {i} has no context: nothing precedes its first target.")
            if limit is not None and length > limit:
                raise ValueError(
                    f"Row {i} has {length} tokens, but the model learned only {limit} positions."
                )
        return in_order(self._batches(rows, limit))

    def _batches(self, rows: Sequence[Row], limit: int | None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index, log-probabilities) of each row, batch by batch."""
        lengths = [len(row.context) + len(row.targets) - 1 for row in rows]
        batches = batches_by_length(lengths, self._batch_size)
        for batch in tqdm(
            batches, desc="score", unit="batch", disable=True if len(batches) == 1 else None
        ):
            length = bucket_length(lengths[batch[0]], limit=limit)
            logp_BT = self._score([rows[i] for i in batch], length)
            for i, logp_T in zip(batch, logp_BT, strict=False):  # the batch may have padding rows
                first = len(rows[i].context) - 1
                yield i, logp_T[first : first + len(rows[i].targets)]

    def _score(self, rows: Sequence[Row], length: int) -> np.ndarray:
        batch = padded(rows, self._batch_size, length)
        placed = jax.device_put(batch, self._sharding)
        return np.asarray(self._log_probs(self._params, placed))


def padded(rows: Sequence[Row], batch_size: int, length: int) -> dict[str, np.ndarray]:
    """Returns the columns of a batch [batch_size, length], int32, padded by zeros; text has segment 1."""
    names = ("input_tokens", "target_tokens", "segment_ids")
    columns = {f"decoder_{name}": np.zeros((batch_size, length), np.int32) for name in names}
    for b, row in enumerate(rows):
        text = [*row.context, *row.targets]
        columns["decoder_input_tokens"][b, : len(text) - 1] = text[:-1]
        columns["decoder_target_tokens"][b, : len(text) - 1] = text[1:]
        columns["decoder_segment_ids"][b, : len(text) - 1] = 1
    return columns
