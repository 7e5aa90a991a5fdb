"""Progress of a merge: a bar on a terminal, else a line now and then."""

import contextlib
import sys
import time
from typing import Any

import tqdm

_SECONDS = 15.0  # between lines


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
