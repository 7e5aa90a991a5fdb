"""A process that runs jobs one after another, so that what they share is imported once.

Jobs come as JSON lines on stdin, {"command": [...], "log": FILE}, and each is answered by a line on
stdout, {"status": N, "memory_gb": X}. A command `python -m launch.NAME ...` runs in this process, any
other as its child. At the end of its input, which comes too when the one that started it dies, the process
ends; a job that runs then is sent SIGTERM first, to save its work.
"""

if __name__ == "__main__":
    # A worker's cores, before anything counts them: XLA sizes its threads by them.
    import os
    import sys

    from launch import environment

    cores = os.environ.get("ESPALIER_WORKER_CORES")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, map(int, cores.split(",")))
    environment.restart_with_huge_pages()
    environment.prepare()

    from launch.cluster import worker

    raise SystemExit(worker.serve(sys.stdin))

import contextlib
import ctypes
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

OWN = "launch."


def serve(jobs: Iterable[str]) -> int:
    """Runs jobs until there are no more."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in _watched(jobs):
        job = json.loads(line)
        _begin_peak()
        with _output_to(job["log"]):
            status = run(job["command"])
        answer = {"status": status, "memory_gb": peak_bytes(os.getpid()) / 1e9}
        with contextlib.suppress(BrokenPipeError):  # nobody is left to hear it
            print(json.dumps(answer), file=replies, flush=True)
        _give_back_memory()
    return 0


def _watched(jobs: Iterable[str]) -> Iterator[str]:
    """The same, read beside the job that runs, which is asked to stop when the input ends.

    Not by the kernel's signal for the death of a parent: it comes once for each thread of that one, and
    a second SIGTERM ends a run that is saving.
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
    """The exit status of a command; what it raises is printed, as Python does."""
    if list(command[:2]) != [sys.executable, "-m"] or not command[2].startswith(OWN):
        return subprocess.run(command, check=False).returncode
    sys.argv[:] = command[2:]
    sys.orig_argv[:] = command  # which a run records
    try:
        with warnings.catch_warnings():
            # The module may have been imported before; its functions are the same.
            warnings.simplefilter("ignore", RuntimeWarning)
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
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


@contextlib.contextmanager
def _output_to(log: str) -> Iterator[None]:
    """Output of this process, of its libraries and of its children goes to the end of a file."""
    with open(log, "ab") as file, open(os.devnull, "wb") as nothing:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for number in (1, 2):
                os.dup2(nothing.fileno(), number)


def _begin_peak() -> None:
    """Begins the measurement of the peak anew, where the system can."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_bytes(process: int) -> int:
    """The largest resident set of a process since it began to be measured; 0 if unknown."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _give_back_memory() -> None:
    """What a job has left goes back to the system, so that the next one's peak is its own."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
