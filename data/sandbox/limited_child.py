"""The child process of data/limited_process.py: confines itself, and answers the parent's requests."""

import contextlib
import importlib
import os
import resource
import signal
import sys
import time
from typing import Any

from espalier.data.sandbox import sandbox_calls, sandbox_kernel, sandbox_zygote


def serve(function: str, memory_bytes: str) -> None:
    """Answers requests from standard input until it ends; the main function of the child."""
    channel, null = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    linux = sys.platform == "linux"
    memory = os.open("/proc/self/statm", os.O_RDONLY) if linux else None
    _confine(int(memory_bytes))
    sandbox_zygote.send(channel, {})
    while True:
        answer: dict[str, Any] = {}
        try:
            if (request := sandbox_zygote.receive(channel)) is None:
                return
            # The timer's signal ends the process.
            signal.setitimer(signal.ITIMER_PROF, request["cpu_seconds"])
            answer = {"value": call(request["argument"])}
            signal.setitimer(signal.ITIMER_PROF, 0)
        except MemoryError:
            pass
        # Not `ru_maxrss`, which begins with the memory of the parent.
        pages = os.pread(memory, 100, 0).split()[1] if memory is not None else 0
        answer["resident_bytes"] = int(pages) * resource.getpagesize()
        sandbox_zygote.send(channel, answer)


def _confine(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":  # macOS refuses limits on memory
        return
    time.tzset()  # reads the time zone's file now
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    if sandbox_calls.knows_system_calls():
        with contextlib.suppress(OSError):  # a kernel without Landlock or seccomp
            sandbox_kernel.restrict_files(sandbox_zygote.readable(), [])
        with contextlib.suppress(OSError):
            sandbox_calls.filter_system_calls(threads=True, own_files_only=False)
