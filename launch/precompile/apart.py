"""Compiles programs one at a time, each in a process of its own with limits of time and memory.

A compilation cannot be interrupted, and one that grows without bounds would end the work on all others.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from espalier.launch import environment

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
    """Runs `launch.precompile` with these arguments.

    Args:
      words: arguments without --json.
      limits: limits of the process, after which it is ended.
      waiting: called with the seconds so far, about twice a second.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target, log = pathlib.Path(folder, "report.json"), pathlib.Path(folder, "log")
        command = [sys.executable, "-m", "espalier.launch.precompile", *words, f"--json={target}"]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                cwd=environment.ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            stopped = _watch(process, limits, began, waiting)
        seconds = time.monotonic() - began
        if stopped:
            return Outcome(None, stopped, seconds, stopped=True)
        if process.returncode in (0, 1) and target.exists():
            return Outcome(json.loads(target.read_text("utf-8")), "", seconds)
        return Outcome(None, _last_error(log, process.returncode), seconds)


def _watch(
    process: subprocess.Popen, limits: Limits, began: float, waiting: Callable[[float], None]
) -> str:
    """Waits for a process; returns why the limits ended it, or ''."""
    try:
        while process.poll() is None:
            seconds = time.monotonic() - began
            waiting(seconds)
            used = _memory(process.pid)
            if seconds > limits.seconds:
                return f"stopped after {limits.seconds:.0f} s, the limit of time"
            if used > limits.memory_bytes:
                return f"stopped at {used / 1e9:.1f} GB, the limit of memory"
            time.sleep(_POLL_SECONDS)
        return ""
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _memory(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _last_error(log: pathlib.Path, code: int) -> str:
    """Returns the line of an error that a command printed, or the last line of a traceback."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = errors or [line for line in lines if line] or ["no message"]
    return f"{last[-1][:500]} (status {code})"
