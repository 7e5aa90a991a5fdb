"""Measures a process's wall time by part: start, compilation, data, sampling, steps, saving, evaluation.

trainers/telemetry/lifetime.py adds up the processes of a run.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from espalier.common import stages

# What a command says of a part that lasts; steps and waits for batches are told by the loop.
_STAGES = {
    "data": "opening the data",
    "restore": "making or restoring the state",
    "compile": "compiling the step",
    "generation": "generating",
    "checkpoint": "saving",
    "evaluation": "evaluating",
}
# Interpreter, imports and checks; opening the data; restoring or making the state; the rest of compilation.
_BEFORE = ("init", "data", "restore")
START_PARTS = (*_BEFORE, "compile")
# What a line calls a part by another word than metrics: a run that restores nothing compiles and makes its state there.
SHOWN = {"restore": "state"}
PARTS = (*START_PARTS, "data_wait", "generation", "step", "checkpoint", "evaluation")


class Goodput:
    """Splits wall time into named parts; every second counts for exactly one part.

    Time inside a nested `measure` counts only for the inner part. Time outside of `measure` counts as
    'init' before the first part other than 'init', 'data' and 'restore', and as 'other' after it.

    Attributes:
      seconds: seconds so far by part, including 'other'.
    """

    def __init__(
        self, *, started: float | None = None, clock: Callable[[], float] = time.monotonic
    ):
        """Starts counting at the time `started` of `clock` (in seconds), see `process_start`; None for now."""
        self._clock = clock
        self._last = clock() if started is None else started
        self._stack = ["init"]
        self.seconds = dict.fromkeys((*PARTS, "other"), 0.0)

    def _count(self) -> None:
        now = self._clock()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Context manager that counts the time inside as `part`."""
        if part not in PARTS:
            raise ValueError(f"Unknown part {part!r}: choose from {PARTS}.")
        self._count()
        if part not in _BEFORE:
            self._stack[0] = "other"
        self._stack.append(part)
        named = stages.stage(_STAGES[part]) if part in _STAGES else contextlib.nullcontext()
        try:
            with named:
                yield
        finally:
            self._count()
            self._stack.pop()

    def so_far(self) -> dict[str, float]:
        """Returns `seconds` up to now; another thread may call it."""
        seconds = dict(self.seconds)
        seconds[self._stack[-1]] += max(self._clock() - self._last, 0.0)
        return seconds

    def metrics(self, prefix: str = "time/") -> dict[str, float]:
        """Returns the seconds so far by part, and 'goodput', the share of all time spent in steps."""
        self._count()
        total = sum(self.seconds.values())
        values = {prefix + part: seconds for part, seconds in self.seconds.items()}
        values[prefix + "goodput"] = self.seconds["step"] / total if total else 0.0
        return values


def process_start() -> float:
    """Returns the value of `time.monotonic` when this process began; the current value if that is unknown."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            # Field 22: start time after boot.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        since_boot = ticks / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.monotonic() - max(age, 0.0)
