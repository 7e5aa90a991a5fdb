"""Reads rows of tokens in batches of similar length: their log-probabilities, or the mean of their hidden states.

Shapes: B batch, T length, D width.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from espalier.common.bars import Bar
from espalier.trainers.decoding.buckets import (
    batches_by_length,
    bucket_length,
    in_order,
    padded,
    stacked,
)
from espalier.trainers.inputs import pack
from espalier.trainers.objectives.forward import frozen_forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Target tokens, the context tokens before them, and the tokens that an encoder reads.

    Attributes:
      columns: what layers read of the row besides its tokens, by name of the batch's column; the same names in all rows.
    """

    context: Sequence[int]
    targets: Sequence[int]
    encoder_inputs: Sequence[int] = ()
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> int:
        """Number of tokens that are read to predict the targets: the last target is not an input."""
        return len(self.context) + len(self.targets) - 1


class Batched:
    """Applies a function to rows in batches of similar length; compiles once for each of a few lengths.

    Args:
      function: (params, arrays of a batch) -> arrays whose first axis is the batch's rows.
      columns: (rows, batch_size, length) -> arrays of a batch, padded to batch_size rows of this length.
      model: the model that reads the rows, for its number of learned positions.
      sharding: sharding of a batch's rows; calls must be within its mesh. None on one device.
      bucket: (length of the longest row, limit=) -> length of a batch.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Any],
        columns: Callable[[list[Any], int, int], Any],
        model: Any,
        *,
        batch_size: int,
        sharding: NamedSharding | None,
        bucket: Callable[..., int] = bucket_length,
    ):
        whole = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
        self._function = jax.jit(function, out_shardings=whole)
        self._columns, self._bucket = columns, bucket
        self._batch_size, self._sharding = batch_size, sharding
        self.limit: int | None = model.max_length

    def __call__(
        self,
        params: Any,
        rows: Sequence[Any],
        lengths: Sequence[int],
        *,
        title: str | None = None,
        done: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Any]]:
        """Yields (index of a row, its result), batch by batch, the longest first.

        Args:
          lengths: lengths of the rows, at most `limit`.
          title: label of a progress bar; None for no bar.
          done: called after each batch.
        """
        batches = batches_by_length(lengths, self._batch_size)
        quiet = True if title is None or len(batches) == 1 else None
        for batch in Bar(batches, desc=title, unit="batch", disable=quiet):
            length = self._bucket(lengths[batch[0]], limit=self.limit)
            arrays = self._columns([rows[i] for i in batch], self._batch_size, length)
            placed = jax.device_put(arrays, self._sharding)
            results = jax.device_get(self._function(params, placed))
            for b, i in enumerate(batch):
                yield i, jax.tree.map(lambda array, b=b: array[b], results)
            done()


def check_lengths(lengths: Sequence[int], limit: int | None) -> None:
    """Raises ValueError for a row that is longer than the learned positions of a model."""
    for i, length in enumerate(lengths):
        if limit is not None and length > limit:
            raise ValueError(
                f"Row {i} has {length} tokens, but the model learned only {limit} positions."
            )


class Scorer:
    """Computes log-probabilities of targets; see `Batched` for `batch_size` and `sharding`."""

    def __init__(
        self, model: Any, params: Any, *, batch_size: int, sharding: NamedSharding | None = None
    ):
        def log_probs(params: Any, batch: Any) -> jax.Array:
            return frozen_forward(model, params, batch).log_probs_BT()

        columns = encoded_columns if model.row.encodes else scored_columns
        self.model, self._params = model, params
        self._read = Batched(log_probs, columns, model, batch_size=batch_size, sharding=sharding)

    def use(self, params: Any) -> None:
        """Sets other parameters of the same shapes, for which all programs stay."""
        self._params = params

    def __call__(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Returns the log-probability of every target of each row, float32; raises the errors of `stream`."""
        return list(self.stream(rows))

    def stream(self, rows: Sequence[Row]) -> Iterator[np.ndarray]:
        """Yields the log-probabilities of each row, in the order of the rows.

        Raises:
          ValueError: a row has no context, or is longer than the model's learned positions.
        """
        for i, row in enumerate(rows):
            if not len(row.context):
                raise ValueError(f"Row {i} has no context: nothing precedes its first target.")
            if row.columns.keys() != rows[0].columns.keys():
                raise ValueError(
                    f"Row {i} has {[*row.columns] or 'no column'} besides its tokens, and row 0 has "
                    f"{[*rows[0].columns] or 'none'}: give the same to all rows."
                )
        lengths = [row.inputs for row in rows]
        check_lengths(lengths, self._read.limit)
        scored = self._read(self._params, rows, lengths, title="score")
        return in_order(
            (i, logp_T[len(rows[i].context) - 1 :][: len(rows[i].targets)]) for i, logp_T in scored
        )


class MeanStates:
    """Computes the mean final hidden state of each row's targets; see `Batched` for `batch_size` and `sharding`.

    The encoder of an encoder-decoder reads context and targets, and the states are its own.
    """

    def __init__(
        self, model: Any, params: Any, *, batch_size: int, sharding: NamedSharding | None = None
    ):
        def means(params: Any, arrays: Any) -> jax.Array:
            tokens_BT, segments_BT, mask_BT = arrays
            variables = {"params": params}
            if model.row.encodes:
                states_BTD = model.apply(
                    variables, tokens_BT, segments_BS=segments_BT, method="encode"
                ).states_BSD
            else:
                states_BTD = model.apply(
                    variables, tokens_BT, segments_BT=segments_BT, method="hidden"
                ).hidden_BTD
            sums_BD = jnp.einsum("btd,bt->bd", states_BTD.astype(jnp.float32), mask_BT)
            return sums_BD / jnp.maximum(mask_BT.sum(-1, keepdims=True), 1)

        self._params = params
        self._read = Batched(
            means, _masked_columns, model, batch_size=batch_size, sharding=sharding
        )

    def stream(self, rows: Sequence[Row], *, title: str | None = "states") -> Iterator[np.ndarray]:
        """Yields for each row the mean [D], float32, of the states of its targets, which are read after its context.

        Args:
          title: label of a progress bar; None for no bar.

        Raises:
          ValueError: a row is longer than the model's learned positions.
        """
        lengths = [len(row.context) + len(row.targets) for row in rows]
        check_lengths(lengths, self._read.limit)
        return in_order(self._read(self._params, rows, lengths, title=title))


def scored_columns(rows: Sequence[Row], batch_size: int, length: int) -> dict[str, np.ndarray]:
    """Returns input tokens, targets and segments [batch_size, length], int32, padded by zeros."""
    texts = [[(row.context, row.targets)] for row in rows] + [[]] * (batch_size - len(rows))
    columns = pack(texts, np.zeros(batch_size), length=length)
    names = ("input_tokens", "target_tokens", "segment_ids")
    read = {name: columns[name] for name in map("decoder_{}".format, names)}
    return {**read, **stacked([row.columns for row in rows], batch_size)}


def encoded_columns(rows: Sequence[Row], batch_size: int, length: int) -> dict[str, np.ndarray]:
    """Returns `scored_columns`, and tokens and segments of an encoder's inputs, padded to a length of their own.

    Absent rows have no token: all their segments are 0.
    """
    width = bucket_length(max(len(row.encoder_inputs) for row in rows))
    tokens_BS, lengths_B = padded([row.encoder_inputs for row in rows], batch_size, width)
    lengths_B[len(rows) :] = 0
    real_BS = np.arange(width)[None] < lengths_B[:, None]
    return {
        **scored_columns(rows, batch_size, length),
        "encoder_input_tokens": tokens_BS,
        "encoder_segment_ids": real_BS.astype(np.int32),
    }


def _masked_columns(rows: Sequence[Row], batch_size: int, length: int) -> tuple[np.ndarray, ...]:
    """Returns tokens and segments, int32, and 1.0 at the targets; text has segment 1."""
    tokens_BT = np.zeros((batch_size, length), np.int32)
    segments_BT, mask_BT = np.zeros_like(tokens_BT), np.zeros(tokens_BT.shape, np.float32)
    for b, row in enumerate(rows):
        text = [*row.context, *row.targets]
        tokens_BT[b, : len(text)] = text
        segments_BT[b, : len(text)] = 1
        mask_BT[b, len(row.context) : len(text)] = 1
    return tokens_BT, segments_BT, mask_BT
