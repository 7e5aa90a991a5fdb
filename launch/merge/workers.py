"""Runs the merge of a tensor on threads, which read, compute and round its blocks, and shows the progress of the merge."""

import concurrent.futures
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from espalier.launch.merge.models import Read
from espalier.launch.merge.plan import Planned
from espalier.launch.merge.settings import MergeError

_SECONDS = 15.0  # between lines
BLOCK_BYTES = 16 << 20


class Progress(contextlib.AbstractContextManager):
    """Counts the written bytes of `total`."""

    def __init__(self, total: int, name: str):
        self._total, self._name = max(1, total), name
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="merge")
        self._done = self._skipped = 0
        self._start = self._shown = time.monotonic()

    def skip(self, nbytes: int) -> None:
        """Counts bytes that an earlier run has written."""
        self._skipped += nbytes
        self.add(nbytes)

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        elif (now := time.monotonic()) - self._shown >= _SECONDS:
            self._shown = now
            share = self._done / self._total
            speed = (self._done - self._skipped) / max(1e-9, now - self._start)
            left = (self._total - self._done) / max(1.0, speed)
            print(
                f"{self._name}: {share:.0%} of {self._total / 1e9:.2f} GB, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()


class Workers(contextlib.AbstractContextManager):
    """Threads for blocks.

    Args:
      block_bytes: bytes of an input that are in memory at a time, in all threads together.
      threads: number of threads; None for one for each processor that this process may use.
    """

    def __init__(self, *, block_bytes: int = BLOCK_BYTES, threads: int | None = None):
        self.threads = threads or len(os.sched_getaffinity(0))
        self._block_bytes = max(1, block_bytes // (self.threads + 1))
        self._pool = concurrent.futures.ThreadPoolExecutor(self.threads, "merge")

    def run(self, x: Planned, reads: Sequence[Read]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the blocks of a merged tensor in order, as (first index, values)."""
        widest = max(dtype.itemsize for dtype in x.dtypes)
        block = max(1, self._block_bytes // widest)
        if x.job is None:
            size = int(np.prod(x.shape))
            yield from (
                (low, reads[0](low, min(low + block, size))) for low in range(0, size, block)
            )
            return
        yield from x.job.blocks(reads, x.dtypes, block=block, pool=self._pool, threads=self.threads)

    def check_equal(self, planned: Sequence[Planned], models: Any, file: str) -> None:
        """Raises MergeError if tensors that are not floats differ between models."""
        for x in planned:
            if x.job is not None:
                continue
            reads = [models[path].read(name) for path, name in x.inputs]
            size, step = int(np.prod(x.shape)), 1 << 20
            for low in range(0, size, step):
                first, *others = (read(low, min(low + step, size)) for read in reads)
                for (path, _), other in zip(x.inputs[1:], others, strict=True):
                    if not np.array_equal(first, other):
                        raise MergeError(
                            f"{file}: {x.name} holds {first.dtype.name}, which cannot be averaged, and differs between "
                            f"{x.inputs[0][0]} and {path}: make them equal, or leave out one of the models."
                        )

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)
