"""Batches of documents and queries: one text in each row, padded to one of few lengths.

Shapes: B rows, T tokens, S tokens of an encoder's inputs.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from espalier.trainers.decoding.buckets import BATCHES_SORTED, batches_by_length, bucket_length
from espalier.trainers.inputs import pack
from espalier.trainers.scoring.scoring import Row, encoded_columns


class DocumentBatch(NamedTuple):
    """Rows of a batch.

    Attributes:
      indices: their indices among all documents; fewer than the batch's rows if some are padding.
      arrays: columns of the batch.
    """

    indices: list[int]
    arrays: dict[str, np.ndarray]


def columns(
    rows: Sequence[Row], ids: Sequence[int], size: int, length: int
) -> dict[str, np.ndarray]:
    """Returns the columns of a batch of `size` rows; rows after the last are padding.

    `decoder_loss_weights` is 1 at the targets of a row, `document_ids` are ids, and rows with an encoder's inputs have
    these.
    """
    texts = [[(row.context, row.targets)] if row.targets else [] for row in rows]
    texts += [[]] * (size - len(rows))
    batch = pack(texts, np.zeros(size), length=length)
    if any(row.encoder_inputs for row in rows):
        batch |= encoded_columns(rows, size, length)
    ids_B = np.zeros(size, np.int32)
    ids_B[: len(ids)] = ids
    unused = ("source_ids", "decoder_positions")
    return {name: x for name, x in batch.items() if name not in unused} | {"document_ids": ids_B}


def batches(
    rows: Sequence[Row], *, first: int, batch_size: int, limit: int | None
) -> Iterator[DocumentBatch]:
    """Yields batches of rows of similar length, the longest first; rows without targets are in none.

    Args:
      rows: documents, with the ids first, first + 1, ...
      batch_size: rows of a batch.
      limit: the model's longest row; None for no limit.
    """
    read = [i for i, row in enumerate(rows) if row.targets]
    for batch in batches_by_length([rows[i].inputs for i in read], batch_size):
        chosen = [read[b] for b in batch]
        length = bucket_length(rows[chosen[0]].inputs, limit=limit)
        ids = [first + i for i in chosen]
        yield DocumentBatch(ids, columns([rows[i] for i in chosen], ids, batch_size, length))


def windows(documents: Iterable[Any], batch_size: int) -> Iterator[list[Any]]:
    """Yields the documents of BATCHES_SORTED batches at a time, in order: what is in memory, and sorted by length."""
    iterator = iter(documents)
    while window := list(itertools.islice(iterator, BATCHES_SORTED * batch_size)):
        yield window


def placed(arrays: Any, sharding: NamedSharding | None) -> Any:
    """Returns arrays on the devices, split by rows over the axes of documents."""
    return jax.device_put(arrays, sharding)
