"""Runs one process of a run of several as a child, and gives a reason when JAX aborts it.

JAX aborts a process whose coordinator (process 0) is gone, with the stacks of its own threads. The supervisor
replaces them by one message, and the signal by an exit status that says whether to start again.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

from espalier.launch.processes import peers

# Messages of JAX's coordination service: about other processes, which launch/processes/peers.py watches.
_NOISE = re.compile(rb"[IWE]\d{4} [\d:.]+ +\d+ coordination_service|\[Gloo\] Rank \d+ is connected")
_FATAL = re.compile(rb"F\d{4} .*JAX distributed service")
_SET_PDEATHSIG = 1
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def supervise() -> int | None:
    """Runs this process's command again as a child and returns its exit status; returns None in the child."""
    if peers.STATUS_FILE in os.environ:
        return None
    with tempfile.NamedTemporaryFile(prefix="espalier_", suffix=".json") as file:
        environment = {**os.environ, peers.STATUS_FILE: file.name}
        sys.stdout.flush()
        child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env=environment,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that Ctrl-C comes once, from here
            preexec_fn=die_with_parent,
        )
        assert child.stderr is not None
        relay = _Relay(child.stderr)
        with forwarded([child], (*STOPS, signal.SIGUSR1, signal.SIGUSR2)):
            status = child.wait()
            relay.thread.join()
        with contextlib.suppress(ValueError):
            facts = json.loads(file.read() or b"{}")
    if status >= 0:
        return status
    if status == -signal.SIGABRT and relay.fatal:
        if "status" in facts:  # the work was done before the coordinator left
            return facts["status"]
        if os.environ.get("ESPALIER_TRACEBACK") == "1":
            sys.stderr.buffer.write(relay.fatal)
        lost = (
            "process 0 of this run, its coordinator, is lost: it has ended, or cannot be reached."
        )
        advice = peers.advice(facts.get("run"), peers.START_AGAIN)
        print(f"\nerror: {facts.get('joining') or f'{lost} {advice}'}", file=sys.stderr)
        return peers.START_AGAIN
    return shell_status(status)


class _Relay:
    """Copies a child's stderr to this process's, except the messages of JAX's coordination service.

    Attributes:
      fatal: the message with which JAX aborted the child, with its stacks.
    """

    def __init__(self, source: IO[bytes]):
        self.fatal = b""
        self._source = source
        self.thread = threading.Thread(target=self._copy, daemon=True)
        self.thread.start()

    def _copy(self) -> None:
        rest = b""
        while chunk := os.read(self._source.fileno(), 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._line(line + b"\n")
            if rest.startswith(b"\r"):  # a progress bar has no end of line
                self._line(rest)
                rest = b""
        self._line(rest)

    def _line(self, line: bytes) -> None:
        if self.fatal or _FATAL.match(line):
            self.fatal += line
        elif not _NOISE.match(line):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()


def shell_status(code: int) -> int:
    """Returns the exit status of a child process as a shell reports it, also after a signal."""
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def handled(numbers: Iterable[int], handle: Callable[[int, Any], Any]) -> Iterator[None]:
    """Context manager: these signals call `handle` inside it; the earlier handlers are restored after it."""
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def forwarded(
    children: Sequence[subprocess.Popen], numbers: Iterable[int] = STOPS
) -> Iterator[list[int]]:
    """Context manager: signals to this process go to the children; yields the list of those received."""
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    with handled(numbers, forward):
        yield received


def die_with_parent() -> None:
    """Lets this process be killed when its parent ends; for a child before it runs its program."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
