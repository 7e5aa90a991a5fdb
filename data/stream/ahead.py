"""Batches that are read before they are asked for, which hides the latency of caches in an object store.

A batch is a function of its step and rows, so that reading it early changes nothing in it. Whoever asks for the same rows of
consecutive steps finds the next ones read, or under way, in threads that mostly wait for the store.
"""

import concurrent.futures
import threading
from collections.abc import Callable

import numpy as np

from espalier.data.cache import blocks

Batch = dict[str, np.ndarray]
_MOST = 32  # batches that are read at once
_MEMORY = 64_000_000  # bytes of batches, and of the blocks of the cache from which they are made
_BLOCKS_PER_ROW = 2  # estimated


class Ahead:
    """Reads batches ahead of who asks for them.

    The number of batches ahead is doubled each time that the next one is not there yet, up to a bound by memory. After a jump
    to another step, what was read for nothing is dropped.

    Args:
      read: (step, lo, hi) -> rows [lo, hi) of the batch of a step; called from several threads.

    Attributes:
      depth: the number of batches ahead.
    """

    def __init__(self, read: Callable[[int, int, int], Batch]):
        self.depth, self._limit = 1, 1
        self._read, self._lock = read, threading.Lock()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: dict[tuple[int, int, int], concurrent.futures.Future[Batch]] = {}
        self._last: dict[tuple[int, int], int] = {}  # step that was asked for last, by rows

    def get(self, step: int, lo: int, hi: int) -> Batch:
        """Returns rows [lo, hi) of the batch of a step; raises what reading it raises."""
        with self._lock:
            consecutive = self._last.get((lo, hi)) == step - 1
            self._last[lo, hi] = step
            expected = self._pending.pop((step, lo, hi), None)
            if expected is not None and not expected.done():
                self.depth = min(2 * self.depth, self._limit)
            last = step + self.depth * consecutive
            for key in [key for key in self._pending if key[1:] == (lo, hi)]:
                if not step < key[0] <= last:
                    self._pending.pop(key).cancel()
            for ahead in range(step + 1, last + 1):
                if (ahead, lo, hi) not in self._pending:
                    self._pending[ahead, lo, hi] = self._threads().submit(self._read, ahead, lo, hi)
        batch = self._read(step, lo, hi) if expected is None else expected.result()
        cost = (hi - lo) * blocks.BYTES * _BLOCKS_PER_ROW + sum(x.nbytes for x in batch.values())
        self._limit = max(1, min(_MOST, _MEMORY // cost))
        self.depth = min(self.depth, self._limit)
        return batch

    def _threads(self) -> concurrent.futures.ThreadPoolExecutor:
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(_MOST, "batches ahead")
        return self._pool
