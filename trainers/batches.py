"""Turns a stream of rows into sharded global arrays, which a thread prepares ahead.

The stream is a pure function of (step, row range) and every device asks for its own rows, so that the
contents of a batch do not depend on the mesh or the number of hosts.
"""

import collections
import concurrent.futures
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

Index = tuple[slice, ...]


class Stream(Protocol):
    """A data stream, as trainers use it; data/stream/train_stream.py is one.

    Attributes:
      batch_size: rows of a global batch.
      length: units in a row, as `Recipe.length`.
      source_names: the names that `source_ids` index.
      fingerprint: a digest of everything that determines the contents of batches.
    """

    batch_size: int
    length: int
    source_names: tuple[str, ...]
    fingerprint: str

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns rows [lo, hi) of the global batch of `step`."""

    def documents(self, step: int, lo: int, hi: int) -> list[dict[str, Any]]:
        """Returns source, documents and epoch of these rows."""

    def summary(self) -> dict[str, Any]:
        """Returns facts to record with a run."""

    def notices(self) -> Sequence[tuple[str, str]]:
        """Returns (name, text) of messages on data that are dropped or cut; the name is WARNING for a large share."""


class TrainStream(Stream, Protocol):
    """A stream to train on, which also knows how its data continue, run out and repeat."""

    def steps_for_tokens(self, tokens: float) -> int:
        """Returns the steps that train on this many loss-bearing tokens, rounded up."""

    def steps_for_epochs(self, epochs: float) -> int:
        """Returns the steps that read the data this often, rounded up."""

    def epochs(self, step: int) -> dict[str, float]:
        """Returns how often each source has been read before `step`."""

    def positions(self, step: int) -> dict[str, dict[str, Any]]:
        """Returns how far each source has been read before `step`, for a phase that reads on there."""

    def check_repeats(self, steps: int) -> list[str]:
        """Returns warnings about repeats in a run of `steps`; raises ValueError beyond a strict cap."""


class Feed(Protocol):
    """The loop's source of batches: a `Prefetcher`, or one that makes them with the current state.

    Attributes:
      part: the part of the run's time that waiting for a batch counts as, see telemetry/goodput.py.
      of_state: whether batches depend on the state, so that the update before must have finished.
      units: tokens or images in a batch, as rates count them.
    """

    part: str
    of_state: bool

    @property
    def units(self) -> int: ...

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes, dtypes and shardings of batches."""

    def get(self, step: int, state: Any) -> dict[str, jax.Array]:
        """Returns the batch of a data step, a function of the step and the train state before it."""

    def close(self) -> None:
        """Stops background work; a later `get` may start it again."""


def global_batch(stream: Stream, step: int, sharding: NamedSharding) -> dict[str, jax.Array]:
    """Returns the batch of one step as global arrays; each process reads only its own rows."""

    @functools.cache  # several devices, and all features, need the same rows
    def rows(lo: int, hi: int) -> dict[str, np.ndarray]:
        return stream.batch(step, lo, hi)

    size = stream.batch_size
    (own, *_) = sharding.addressable_devices_indices_map((size,)).values()
    assert own is not None  # an array always has an index on a device of its sharding
    first = rows(*own[0].indices(size)[:2])

    def place(name: str, array: np.ndarray) -> jax.Array:
        def shard(index: Index | None) -> np.ndarray:
            assert index is not None  # as above
            return rows(*index[0].indices(size)[:2])[name]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, shard)

    return {name: place(name, array) for name, array in first.items()}


def abstract_batch(stream: Stream, sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of the stream's global batches."""

    def whole(row: np.ndarray) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(row.dtype)  # the dtype on devices
        shape = (stream.batch_size, *row.shape[1:])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return {name: whole(row) for name, row in stream.batch(0, 0, 1).items()}


class Prefetcher:
    """Global batches of consecutive steps, `ahead` of them prepared by a thread.

    A `get` out of order, as after a rollback, restarts the thread there.
    """

    part = "data_wait"
    of_state = False

    def __init__(self, stream: Stream, sharding: NamedSharding, *, ahead: int = 2):
        self._stream, self._sharding, self._ahead = stream, sharding, ahead
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: collections.deque[concurrent.futures.Future] = collections.deque()
        self._next = -1

    @property
    def units(self) -> int:
        return self._stream.batch_size * self._stream.length

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `abstract_batch`."""
        return abstract_batch(self._stream, self._sharding)

    def get(self, step: int, state: Any = None) -> dict[str, jax.Array]:
        """Returns the batch of `step`; raises the error of reading it."""
        if step != self._next or self._thread is None:
            self.close()
            self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._next = step + 1
        while len(self._pending) <= self._ahead:
            ahead = step + len(self._pending)
            future = self._thread.submit(global_batch, self._stream, ahead, self._sharding)
            self._pending.append(future)
        try:
            return self._pending.popleft().result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops the thread; a later `get` starts it again."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
            self._pending.clear()
