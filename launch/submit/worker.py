"""A process that runs jobs one after another, so that shared modules are imported once.

Jobs are JSON lines on stdin, {"command": [...], "log": FILE}. The answer to each is a line on stdout,
{"status": N, "memory_gb": X}. A command `python -m espalier.launch.NAME ...` runs in this process, any other command in a
child process. The process ends when its input ends, also because the parent has died. A job that is still running
then receives SIGTERM first, so that it saves its work.
"""

import contextlib
import gc
import json
import os
import queue
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence

from espalier.launch import environment
from espalier.launch.processes.supervisor import handled
from espalier.trainers import host_memory

OWN = ("espalier.launch.", "launch.")  # the latter of a checkout, in which it is the same file


def serve(jobs: Iterable[str]) -> int:
    """Runs jobs until the input ends; returns the exit status 0."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in _watched(jobs):
        job = json.loads(line)
        _begin_peak()
        with _output_to(job["log"]):
            status = run(job["command"])
        answer = {"status": status, "memory_gb": peak_bytes(os.getpid()) / 1e9}
        with contextlib.suppress(BrokenPipeError):  # the reader has ended
            print(json.dumps(answer), file=replies, flush=True)
        gc.collect()  # the last job's memory must not count in the next one's peak
        host_memory.give_back()
    return 0


def _watched(jobs: Iterable[str]) -> Iterator[str]:
    """Yields the lines of `jobs`; a thread reads them, and sends SIGTERM to a running job when the input ends.

    The kernel's parent-death signal is not used: it comes once for each thread of the parent, and a second SIGTERM
    ends a run that is saving.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    busy = threading.Event()

    def read() -> None:
        for line in jobs:
            lines.put(line)
        lines.put(None)
        if busy.is_set():
            os.killpg(os.getpgrp(), signal.SIGTERM)  # children of the job too

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get()) is not None:
        busy.set()
        yield line
        busy.clear()


def run(command: Sequence[str]) -> int:
    """Runs a command and returns its exit status; prints its exceptions as Python does."""
    if list(command[:2]) != [sys.executable, "-m"] or not command[2].startswith(OWN):
        return _run_child(command)
    sys.argv[:] = command[2:]
    sys.orig_argv[:] = command  # which a run records
    try:
        with warnings.catch_warnings():
            # The module may have been imported before; its functions are the same.
            warnings.simplefilter("ignore", RuntimeWarning)
            module = f"espalier.{command[2].removeprefix('espalier.')}"
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _run_child(command: Sequence[str]) -> int:
    """Runs a child process and returns its exit status; 75 if the job was cancelled and the child ended of that.

    SIGTERM reaches every process of the group. The child decides what to do with it; this process only waits,
    because the group is killed when it ends. A handler is reset in the child, where SIG_IGN would be inherited.
    """
    cancels: list[int] = []
    with handled([signal.SIGTERM], lambda number, _: cancels.append(number)):
        status = subprocess.run(command, check=False).returncode
    return (
        os.EX_TEMPFAIL if cancels and status in (-signal.SIGTERM, 128 + signal.SIGTERM) else status
    )


@contextlib.contextmanager
def _output_to(log: str) -> Iterator[None]:
    """Appends the output of this process, its libraries and its children to a file."""
    with open(log, "ab") as file, open(os.devnull, "wb") as nothing:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for number in (1, 2):
                os.dup2(nothing.fileno(), number)


def _begin_peak() -> None:
    """Resets the peak of memory use, if the system supports it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_bytes(process: int) -> int:
    """Returns the peak resident set of a process, in bytes, since the last reset; 0 if unknown."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    # XLA chooses its number of threads by the cores, so they are set before jax is imported.
    cores = os.environ.get("ESPALIER_WORKER_CORES")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, map(int, cores.split(",")))
    environment.restart_with_huge_pages()
    environment.prepare()

    from espalier.launch.submit import worker  # jobs replace the module `__main__`

    raise SystemExit(worker.serve(sys.stdin))
