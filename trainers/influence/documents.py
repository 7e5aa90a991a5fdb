"""How a model reads documents and queries: one text in each row of a batch, padded to one of few lengths.

Shapes: B rows, T tokens, S tokens of an encoder's inputs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from espalier.trainers.decoding.buckets import BATCHES_SORTED, batches_by_length, bucket_length
from espalier.trainers.influence import spread
from espalier.trainers.influence.backward import backward
from espalier.trainers.influence.consumers import Consumer
from espalier.trainers.influence.sites import Site
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


def windows(documents: Iterable[Any], batch_size: int) -> Iterator[list[Any]]:
    """Yields the documents of BATCHES_SORTED batches at a time, in order: what is in memory, and sorted by length."""
    iterator = iter(documents)
    while window := list(itertools.islice(iterator, BATCHES_SORTED * batch_size)):
        yield window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """How a model reads documents.

    Attributes:
      model, params: a language model and its parameters.
      batch_size: rows of a batch.
      sharding: sharding of a batch's rows; calls must be within its mesh. None on one device.
    """

    model: Any
    params: Any
    batch_size: int
    sharding: NamedSharding | None = None
    _programs: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def whole(self) -> NamedSharding | None:
        """The sharding of results, which every device has whole."""
        return None if self.sharding is None else NamedSharding(self.sharding.mesh, PartitionSpec())

    def compiled(self, sites: Mapping[str, Site], consumer: Consumer) -> Callable[..., Any]:
        """Returns `backward` of the sites, compiled: called with (params, inputs, batch, key)."""

        def run(params: Any, inputs: Any, batch: Any, key: Any) -> Any:
            return backward(self.model, sites, consumer, params, inputs, batch, key=key)

        out_shardings: Any = self.whole
        if consumer.matrices and self.sharding is not None:
            zeros = {p: functools.partial(consumer.zeros, site, 1, 1) for p, site in sites.items()}
            shapes = {p: jax.eval_shape(make) for p, make in zeros.items()}
            out_shardings = (spread.shardings(self.sharding.mesh, shapes), self.whole)
        key = (tuple(sites), consumer)
        return self._programs.setdefault(key, jax.jit(run, out_shardings=out_shardings))

    def place(self, arrays: Any) -> Any:
        """Returns arrays on the devices, split by rows over the axes of documents."""
        return jax.device_put(arrays, self.sharding)

    def place_spread(self, arrays: Any) -> Any:
        """Returns sums, eigenvectors and queries, arrays or tensors of files, on the devices, which have a part of each."""

        def place(x: Any) -> jax.Array:
            if self.sharding is None:
                return jax.device_put(np.asarray(x))
            # Each process reads its own parts. `device_put` would compare the whole array between processes.
            own = spread.sharding(self.sharding.mesh, x.shape)
            return jax.make_array_from_callback(x.shape, own, lambda index: x[index])

        return jax.tree.map(place, arrays)

    def batches(self, rows: Sequence[Row], first: int) -> Iterator[DocumentBatch]:
        """Yields batches of rows of similar length, the longest first; rows without targets are in none.

        Documents have the ids first, first + 1, ...
        """
        limit = self.model.max_length
        read = [i for i, row in enumerate(rows) if row.targets]
        for batch in batches_by_length([rows[i].inputs for i in read], self.batch_size):
            chosen = [read[b] for b in batch]
            length = bucket_length(rows[chosen[0]].inputs, limit=limit)
            ids = [first + i for i in chosen]
            arrays = columns([rows[i] for i in chosen], ids, self.batch_size, length)
            yield DocumentBatch(ids, arrays)
