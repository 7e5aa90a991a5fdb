"""Iteration over streams, the base class of the training and evaluation streams, and the evaluation stream."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from espalier.data.cache import store
from espalier.data.stream import ahead, order, rows

Batch = dict[str, np.ndarray]
# Part of every fingerprint: raise it when the same settings produce different batches.
_VERSION = 1


class Source(Protocol):
    """The part of a stream that iteration reads; a stream that ends also has `num_steps`."""

    batch_size: int
    fingerprint: str

    def batch(self, step: int, lo: int, hi: int) -> Batch: ...


class BatchIterator(Iterator[Batch]):
    """The batches of a stream in order, from step 0 on.

    Attributes:
      step: the step of the next batch.
    """

    def __init__(self, stream: Source):
        self._stream = stream
        self.step = 0

    def __next__(self) -> Batch:
        """Returns the whole batch of `step`; an evaluation stream ends after `num_steps` batches."""
        if self.step == getattr(self._stream, "num_steps", None):
            raise StopIteration
        batch = self._stream.batch(self.step, 0, self._stream.batch_size)
        self.step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON: the next step, and the fingerprint of the stream."""
        return {"step": self.step, "fingerprint": self._stream.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at a position that `get_state` returned, also in another process.

        Raises:
          ValueError: the position is in a stream with other batches.
        """
        if state["fingerprint"] != self._stream.fingerprint:
            raise ValueError(
                "The state belongs to another stream: its data, batch size, row length, seed or shares differ, so the "
                "batches would not continue. Make the stream with the same settings as before, or iterate from step 0."
            )
        self.step = state["step"]


class Iterable:
    """Gives a stream `for batch in stream` and `stream[step]`; each `iter(stream)` begins at step 0."""

    def __iter__(self: Source) -> BatchIterator:
        return BatchIterator(self)

    def __getitem__(self: Source, step: int) -> Batch:
        """Returns the whole batch of a step."""
        return self.batch(step, 0, self.batch_size)


class RowStream(Iterable, abc.ABC):
    """Turns rows of sources into batches; the base class of both streams."""

    fingerprint: str
    _use = ""  # follows the name of a source in a notice

    def __init__(
        self,
        sources: Sequence[rows.Source],
        batch_size: int,
        cross_document_attention: bool,
        start_token: int | None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be positive.")
        if cross_document_attention and len(sources[0].plan.row_lengths) > 1:
            raise ValueError(
                "cross_document_attention is for decoder-only rows: remove the feature 'inputs'."
            )
        self.batch_size = batch_size
        self._sources = tuple(sources)
        self._sentences = (0, 0)
        if width := rows.sentence_width(sources):
            self._sentences = max(int(np.diff(s.plan.row_starts).max()) for s in sources), width
            if cross_document_attention:
                raise ValueError(
                    f"cross_document_attention joins the examples of a row, each of which has its own {rows.SENTENCE!r}: turn it off, "
                    "or leave the embeddings out."
                )
        self._cross_document_attention = cross_document_attention
        self._start_token = start_token
        self._vocabulary = rows.shared_vocabulary(self._sources)
        in_place = any(source.cache.in_place for source in self._sources)
        self._ahead = ahead.Ahead(self.read_batch) if in_place else None

    @property
    def length(self) -> int:
        """Tokens per row, of all features."""
        return sum(self._sources[0].plan.row_lengths.values())

    @property
    def targets_length(self) -> int:
        """Tokens per row of the feature 'targets'."""
        return self._sources[0].plan.row_lengths["targets"]

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources; `source_ids` in a batch index this tuple."""
        return tuple(source.name for source in self._sources)

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns rows [lo, hi) of the batch of `step`; those of caches in a store are read ahead of the steps."""
        read = self._ahead.get if self._ahead else self.read_batch
        return read(step, lo, hi)

    def read_batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns rows [lo, hi) of the batch of `step`, with the columns of `rows.read_rows`."""
        source_B, _, row_B = self._locate(step, lo, hi)
        return rows.read_rows(
            self._sources,
            source_B,
            row_B,
            cross_document_attention=self._cross_document_attention,
            start_token=self._start_token,
            sentences=self._sentences,
        )

    def places(self, step: int, lo: int, hi: int) -> list[dict]:
        """Returns source, epoch and plan row of rows [lo, hi) of the batch of `step`."""
        located = (array.tolist() for array in self._locate(step, lo, hi))
        return [
            {"source": self._sources[source].name, "epoch": epoch, "row": row}
            for source, epoch, row in zip(*located, strict=True)
        ]

    def documents(self, step: int, lo: int, hi: int) -> list[dict]:
        """Returns `places` of rows [lo, hi) of the batch of `step`, with their documents."""
        by_name = {source.name: source for source in self._sources}
        return [
            {**place, "documents": by_name[place["source"]].documents(place["row"])}
            for place in self.places(step, lo, hi)
        ]

    def summary(self) -> dict:
        """Returns facts to record with a run: settings, sizes, fills, counts of long documents."""
        first = self._sources[0].plan
        return {
            "fingerprint": self.fingerprint,
            "batch_size": self.batch_size,
            "lengths": first.row_lengths,
            "packing": first.packing,
            "long_documents": first.long_documents,
            "cross_document_attention": self._cross_document_attention,
            "start_token": self._start_token,
            "vocabulary": self._vocabulary,
            "sources": {source.name: source.summary() for source in self._sources},
        }

    def notices(self, lengths: Mapping[str, int] | None = None) -> list[rows.Notice]:
        """Returns messages on each source's records that were dropped or cut; see `rows.Source.notices`.

        Args:
            lengths: the setting that limits the records; by default that of this stream's rows.
        """
        limits = self._sources[0].plan.row_lengths if lengths is None else lengths
        return [
            (name, f"{source.name}{self._use}: {text}")
            for source in self._sources
            for name, text in source.notices(limits)
        ]

    @abc.abstractmethod
    def _locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (source index, epoch, plan row) of rows [lo, hi) of the batch of `step`."""

    def _check_range(self, lo: int, hi: int) -> None:
        if not 0 <= lo <= hi <= self.batch_size:
            raise ValueError(f"Rows [{lo}, {hi}) are not within a batch of {self.batch_size}.")

    def _fingerprint(self, **settings) -> str:
        parts = {
            "version": _VERSION,
            "batch_size": self.batch_size,
            "cross_document_attention": self._cross_document_attention,
            "sources": [[s.name, s.cache.content, *s.plan.policy] for s in self._sources],
        }
        if self._start_token != 0:  # older fingerprints have no start_token: it was always 0
            parts["start_token"] = self._start_token
        return store.digest({**parts, **settings})


class EvalStream(RowStream):
    """Reads every row of one source once, in a fixed order; see `data.stream.stream.make_eval_stream`.

    Rows that fill the last batch have loss weight 0.
    """

    _use = ", held out"

    def __init__(
        self,
        source: rows.Source,
        *,
        batch_size: int,
        cross_document_attention: bool = False,
        start_token: int | None = 0,
    ):
        super().__init__([source], batch_size, cross_document_attention, start_token)
        self.name = source.name
        self.num_steps = -(-source.plan.num_rows // batch_size)  # batches that cover the source
        self.bytes_per_token = source.bytes_per_token
        self.fingerprint = self._fingerprint(order="permuted")

    def summary(self) -> dict:
        return {**super().summary(), "num_steps": self.num_steps}

    def _locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_range(lo, hi)
        if not 0 <= step < self.num_steps:
            raise ValueError(
                f"Batch {step} of {self.name!r} does not exist: it has {self.num_steps} batches."
            )
        place_B = step * self.batch_size + np.arange(lo, hi, dtype=np.int64)
        row_B = order.evaluation_rows(place_B, self._sources[0].plan.num_rows, self.name)
        return np.zeros_like(row_B), np.zeros_like(row_B), row_B
