"""Means of a model's final hidden states over the tokens of a text. Shapes: B batch, T length, D width."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from trainers.decoding.buckets import batches_by_length, bucket_length, in_order
from trainers.scoring.scoring import Row


def mean_states(
    model: Any, params: Any, tokens_BT: jax.Array, segments_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """Returns the mean [B, D], float32, of the final states where the mask is 1; segment 0 is padding."""
    hidden_BTD = model.apply(
        {"params": params}, tokens_BT, segments_BT=segments_BT, method="hidden"
    ).hidden_BTD.astype(jnp.float32)
    sums_BD = jnp.einsum("btd,bt->bd", hidden_BTD, mask_BT)
    return sums_BD / jnp.maximum(mask_BT.sum(-1, keepdims=True), 1)


class MeanStates:
    """Computes mean states in batches of similar length; compiles once for each of a few lengths.

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
        self._means = jax.jit(
            lambda params, *arrays: mean_states(model, params, *arrays), out_shardings=whole
        )

    def stream(self, rows: Sequence[Row]) -> Iterator[np.ndarray]:
        """Yields for each row the mean [D] of the states of its targets, which are read after its context.

        Raises:
          ValueError: a row is longer than the model's learned positions.
        """
        limit = self._max_length
        for i, row in enumerate(rows):
            length = len(row.context) + len(row.targets)
            if limit is not None and length > limit:
                raise ValueError(
                    f"Row {i} has {length} tokens, but the model learned only {limit} positions."
                )
        return in_order(self._batches(rows, limit))

    def _batches(self, rows: Sequence[Row], limit: int | None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index, mean) of each row, batch by batch."""
        lengths = [len(row.context) + len(row.targets) for row in rows]
        batches = batches_by_length(lengths, self._batch_size)
        for batch in tqdm(
            batches, desc="states", unit="batch", disable=True if len(batches) == 1 else None
        ):
            length = bucket_length(lengths[batch[0]], limit=limit)
            means_BD = self._read([rows[i] for i in batch], length)
            yield from zip(batch, means_BD, strict=False)  # the batch may have padding rows

    def _read(self, rows: Sequence[Row], length: int) -> np.ndarray:
        tokens_BT = np.zeros((self._batch_size, length), np.int32)
        segments_BT = np.zeros_like(tokens_BT)
        mask_BT = np.zeros(tokens_BT.shape, np.float32)
        for b, row in enumerate(rows):
            text = [*row.context, *row.targets]
            tokens_BT[b, : len(text)] = text
            segments_BT[b, : len(text)] = 1
            mask_BT[b, len(row.context) : len(text)] = 1
        arrays = jax.device_put((tokens_BT, segments_BT, mask_BT), self._sharding)
        return np.asarray(self._means(self._params, *arrays))
