"""Iteration over a stream, with a state of two values to save and restore."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

Batch = dict[str, np.ndarray]


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
