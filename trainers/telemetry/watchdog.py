"""Python's stacks on standard error when a run stands still, such as in a collective that waits for a lost process."""

import contextlib
import faulthandler
import sys
import time
from collections.abc import Callable, Iterator

_PAUSE = 1.0  # seconds between calls of faulthandler, each of which starts a thread


@contextlib.contextmanager
def watching(seconds: float | None) -> Iterator[Callable[[], None]]:
    """Context manager: yields a function that the run calls at each step.

    The stacks of all threads are written whenever it has not been called for `seconds`; the run goes on. They are not
    written for None, nor without a standard error that is a file.
    """
    stderr = sys.__stderr__
    if seconds is None or stderr is None or stderr.closed:
        yield lambda: None
        return
    armed = float("-inf")

    def step() -> None:
        nonlocal armed
        if time.monotonic() - armed >= min(_PAUSE, seconds / 4):
            armed = time.monotonic()
            faulthandler.dump_traceback_later(seconds, repeat=True, file=stderr)

    step()
    try:
        yield step
    finally:
        faulthandler.cancel_dump_traceback_later()
