"""Calls a function of the project on untrusted input, in a child process with limits of time and memory.

The child is started at the first call and used again: a call costs about 0.2 ms, a start 0.2 s. It inherits no file,
socket or lock, and ends when the parent closes its channel or ends. On Linux it can open no files except the standard
library, and can neither start nor signal processes nor use the network (data/sandbox/limited_child.py).

Each process that is forked from the parent starts a child of its own.
"""

import atexit
import contextlib
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any

_ROOT = str(pathlib.Path(__file__).absolute().parents[2])  # from which the package is imported
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from espalier.data.sandbox import limited_child; limited_child.serve(*sys.argv[2:])"
)
_START_SECONDS = 60.0  # for a start on a busy machine
_IDLE_BYTES = 256 << 20  # a child that still has more after its answer is ended
_MAX_ANSWER = 1 << 28  # bytes
_PASSED_ON = ("TZ", "LD_LIBRARY_PATH")  # environment variables; others may be secrets


class LimitError(ValueError):
    """A call uses more time or memory than its limit, or crashes; the message says which, as a predicate."""


class StartError(RuntimeError):
    """The child process does not start."""


class LimitedProcess:
    """A function that runs in a child process. Thread-safe; one call runs at a time.

    Args:
      function: 'package.module:function', called with one JSON value; it returns one, and raises nothing.
      memory_bytes: size of the child's address space.
    """

    _process: subprocess.Popen | None
    _channel: socket.socket | None

    def __init__(self, function: str, *, memory_bytes: int):
        self._function = function
        self._memory_bytes = memory_bytes
        self._forget()
        os.register_at_fork(after_in_child=self._forget_inherited)
        atexit.register(self.close)

    def call(self, argument: Any, *, cpu_seconds: float, wall_seconds: float) -> Any:
        """Returns the function's value for an argument.

        Args:
          argument: a JSON value.
          cpu_seconds: limit on the CPU time of the call.
          wall_seconds: limit on its wall time.

        Raises:
          LimitError: a limit is exceeded, or the child crashes on this argument.
          StartError: the child does not start.
        """
        request = json.dumps({"cpu_seconds": cpu_seconds, "argument": argument}).encode()
        with self._lock:
            for last in (False, True):
                try:
                    answer = self._exchange(request, wall_seconds)
                except TimeoutError:
                    self._end()
                    raise LimitError(f"takes longer than {wall_seconds:g} s") from None
                except (EOFError, ConnectionError):
                    status = self._end()
                    if status == -signal.SIGPROF:
                        raise LimitError(f"uses more than {cpu_seconds:g} s of CPU time") from None
                    # Anything may have ended a child that was waiting; a fresh one shows the cause.
                    if last:
                        raise LimitError(f"crashes its process (status {status})") from None
                except BaseException:  # such as KeyboardInterrupt: the answer is still to come
                    self._end()
                    raise
                else:
                    break
            if answer["resident_bytes"] > _IDLE_BYTES or "value" not in answer:
                self._end()
        if "value" not in answer:
            raise LimitError(f"needs more than {self._memory_bytes >> 20} MiB of memory")
        return answer["value"]

    def close(self) -> None:
        """Ends the child; a later call starts another."""
        with self._lock:
            self._end()

    def _exchange(self, request: bytes, seconds: float) -> dict[str, Any]:
        if self._process is None:
            self._start()
        assert self._channel is not None
        deadline = time.monotonic() + seconds
        self._channel.settimeout(seconds)
        self._channel.sendall(struct.pack("=I", len(request)))
        self._channel.sendall(request)
        return self._receive(deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        (size,) = struct.unpack("=I", self._read(4, deadline))
        if size > _MAX_ANSWER:
            raise EOFError
        try:
            return json.loads(self._read(size, deadline))
        except ValueError:
            raise EOFError from None  # as if it had crashed

    def _read(self, count: int, deadline: float) -> bytearray:
        assert self._channel is not None
        content, done = bytearray(count), 0
        while done < count:
            if (remaining := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._channel.settimeout(remaining)
            part = self._channel.recv_into(memoryview(content)[done:])
            if not part:
                raise EOFError
            done += part
        return content

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        paths = [_ROOT, *map(os.path.abspath, sys.path)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-S", "-X", "utf8", "-c", _START, json.dumps(paths)]
                + [self._function, str(self._memory_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                start_new_session=True,
            )
        self._channel = ours
        try:
            self._receive(time.monotonic() + _START_SECONDS)
        except (EOFError, OSError):
            status = self._end()
            raise StartError(
                f"the process that runs {self._function} with limits cannot start (status {status}): free "
                "some memory, or raise the limit on processes"
            ) from None

    def _end(self) -> int | None:
        """Ends the child, if there is one, and returns its exit status."""
        process, channel = self._process, self._channel
        self._process = self._channel = None
        if channel is not None:
            channel.close()
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.poll() is None and channel is not None:
                # A child that has closed its channel is ending; its own status is the cause.
                return process.wait(timeout=1)
        process.kill()
        return process.wait()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._process = self._channel = None

    def _forget_inherited(self) -> None:
        """Closes the parent's channel in a forked process, where the lock may be held by no thread."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.returncode = 0  # a child of the parent, not to be waited for here
        self._forget()
