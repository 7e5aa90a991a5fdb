"""Compiles programs one at a time, each in a process of its own with limits of time and memory.

A compilation cannot be interrupted, and one that grows without bounds would end the work on all others.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from espalier.launch.submit.base import Job, State, first_error
from espalier.launch.submit.local import LocalSubmitter

_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Limits:
    """Most seconds and bytes of memory of one compilation."""

    seconds: float
    memory_bytes: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The report of a program as `precompile` writes it, or the reason why there is none; seconds in all.

    Attributes:
      stopped: whether the limits ended the compilation, which another limit may finish.
    """

    report: dict[str, Any] | None
    problem: str
    seconds: float
    stopped: bool = False


def compile_apart(
    words: Sequence[str], limits: Limits, *, waiting: Callable[[float], None] = lambda seconds: None
) -> Outcome:
    """Runs `espalier precompile` with these arguments.

    Args:
      words: arguments without --json.
      limits: limits of the process, after which it is ended.
      waiting: called with the seconds so far, about twice a second.
    """
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(LocalSubmitter()) as submitter,
    ):
        target, log = pathlib.Path(folder, "report.json"), pathlib.Path(folder, "log")
        command = (sys.executable, "-m", "espalier.launch.precompile", *words, f"--json={target}")
        handle = submitter.submit(Job(name="precompile", command=command, log=str(log)))
        while (status := submitter.statuses([handle])[handle]).state is not State.ENDED:
            seconds, used = time.monotonic() - began, 1e9 * (status.memory_gb or 0.0)
            waiting(seconds)
            if seconds > limits.seconds:
                problem = f"stopped after {limits.seconds:.0f} s, the limit of time"
                return Outcome(None, problem, seconds, stopped=True)
            if used > limits.memory_bytes:
                problem = f"stopped at {used / 1e9:.1f} GB, the limit of memory"
                return Outcome(None, problem, seconds, stopped=True)
            time.sleep(_POLL_SECONDS)
        seconds = time.monotonic() - began
        if status.exit_status in (0, 1) and target.exists():
            return Outcome(json.loads(target.read_text("utf-8")), "", seconds)
        code = status.exit_status or 0
        return Outcome(None, f"{first_error(log, code)[:500]} (status {code})", seconds)
