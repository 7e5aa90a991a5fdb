"""The process inside `data.sandbox.code_sandbox`: a bare interpreter that confines itself and runs programs.

It reads requests from standard input. For each request it forks a supervisor, which forks the program and answers
on standard output. All these processes have empty environments and no packages. The command is

  python -S -s -P -c "import sys; sys.path.insert(0, ROOT); from data.sandbox import sandbox_zygote as z; z.main()"

A message is its length in 4 bytes, followed by JSON. A program passes if it runs to its end. It cannot forge the
proof of this while it runs: only at its end does the process request a random number from the supervisor and send
it back.
"""

import collections
import contextlib
import gc
import importlib
import io
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import sysconfig
import time
import traceback
import types

from data.sandbox import sandbox_kernel as kernel

# Imported before the forks, so that programs import them at no cost.
_LOADED = ("bisect", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools")
_LOADED += ("heapq", "itertools", "math", "operator", "random", "re", "statistics", "string")
_LOADED += ("typing",)
_END, _RAISED, _NO_MEMORY = b"?", 1, 3
_DESCRIPTOR = 3
_WORK = "/sandbox"  # a folder in the new root, without an interpreter
_NAME = "program"


def main() -> None:
    """Confines the process as the first request asks, then serves requests until the input ends."""
    os.environ.clear()
    sys.path.pop(0)
    for name in _LOADED:
        importlib.import_module(name)
    gc.freeze()  # garbage collection in programs then copies no page of the loaded modules
    setup = receive(0)
    try:
        state = _lock_in(setup)
    except Exception as error:
        send(1, {"error": f"{type(error).__name__}: {error}"})
        return
    send(1, {"protections": state["protections"]})
    own, requests, answers = os.getpid(), os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    while (request := receive(requests)) is not None:
        supervisor = os.fork()
        if not supervisor:
            os.close(requests)
            _answer(answers, request, state, own)
        if os.waitpid(supervisor, 0)[1]:
            send(answers, {"status": "killed", "detail": "its supervisor was killed"})
        _empty(state["work"])


def send(descriptor: int, message: dict) -> None:
    """Writes a message to a file descriptor."""
    body = json.dumps(message).encode("utf-8", "backslashreplace")
    content = memoryview(struct.pack("=I", len(body)) + body)
    while content:
        content = content[os.write(descriptor, content) :]


def receive(descriptor: int) -> dict | None:
    """Reads a message; returns None at the end of the input."""
    head = _read(descriptor, 4)
    return json.loads(_read(descriptor, struct.unpack("=I", head)[0])) if head else None


def _read(descriptor: int, count: int) -> bytes:
    parts = []
    while count and (part := os.read(descriptor, count)):
        parts.append(part)
        count -= len(part)
    return b"" if count else b"".join(parts)


def readable() -> list[str]:
    """Returns the paths an interpreter reads: its library, shared libraries, devices."""
    library = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib")]
    paths = [os.path.join(sys.base_prefix, "lib"), *library, "/usr/lib", "/usr/lib64"]
    paths += ["/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    paths = [path for path in dict.fromkeys(paths) if os.path.exists(path)]
    inner = [p for p in paths if any(p.startswith(f"{other}/") for other in paths)]
    return [path for path in paths if path not in inner] + list(kernel.DEVICES)


def _lock_in(setup: dict) -> dict:
    """Applies the available protections; returns them with the settings for programs."""
    linux = sys.platform == "linux"
    calls = kernel.knows_system_calls()
    becomes_nobody = linux and os.geteuid() == 0
    by: dict[str, str | None] = {}
    if linux and setup["namespaces"]:
        work = _WORK
        kernel.enter_namespaces(readable(), work, setup["limits"]["work_bytes"])
        by = dict.fromkeys(("network", "files", "processes"), "namespaces")
    else:
        work = setup["work"]
        if becomes_nobody:
            becomes_nobody = _everyone_reads(sysconfig.get_path("stdlib"))
        if becomes_nobody:
            os.chown(work, kernel.NOBODY, kernel.NOBODY)
        by = dict.fromkeys(("network", "processes"), "seccomp" if calls else None)
        by["files"] = None
        if calls:
            try:
                kernel.restrict_files(readable(), [work])
                by["files"] = "Landlock and seccomp"
            except OSError:
                pass
    if calls and setup["namespaces"]:
        by = {name: f"{what} and seccomp" for name, what in by.items()}
    return {
        "work": work,
        "limits": setup["limits"],
        "namespaces": linux and setup["namespaces"],
        "calls": calls,
        "becomes_nobody": becomes_nobody,
        "threads": becomes_nobody or os.geteuid() != 0,  # the limit on threads does not bind root
        "protections": by,
    }


def _everyone_reads(path: str) -> bool:
    while os.stat(path).st_mode & 0o005 == 0o005:
        if path == "/":
            return True
        path = os.path.dirname(path)
    return False


def _empty(folder: str) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, onerror=_open_up)
        else:
            os.unlink(entry.path)


def _open_up(function, path, _):
    """Error handler of rmtree: makes folders of the program accessible and retries."""
    for folder in (os.path.dirname(path), path):
        if os.path.isdir(folder) and not os.path.islink(folder):
            os.chmod(folder, 0o700)
    if function in (os.rmdir, os.unlink):
        function(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _answer(answers: int, request: dict, state: dict, parent: int) -> None:
    """Supervises one program and sends the answer; does not return."""
    code = 1
    try:
        if sys.platform == "linux":
            kernel.die_with_parent()
        if os.getppid() == parent:
            send(answers, _supervise(request, state, answers))
            code = 0
    finally:
        os._exit(code)


def _supervise(request: dict, state: dict, answers: int) -> dict:
    limits = state["limits"]
    ours, theirs = socket.socketpair()
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    if state["namespaces"]:
        kernel.unshare_pids()
    began = time.monotonic()
    program = os.fork()
    if not program:
        os.close(answers)
        _become_program(request, state, theirs.fileno(), out_end, err_end)
    for descriptor in (out_end, err_end):
        os.close(descriptor)
    theirs.close()
    tails = {out: _Tail(limits["output_bytes"]), err: _Tail(limits["output_bytes"])}
    nonce = os.urandom(16)
    passed = ended = False
    poll = select.poll()
    for descriptor in (ours.fileno(), out, err):
        poll.register(descriptor, select.POLLIN)
    deadline = began + limits["wall_seconds"]
    while not ended and (remaining := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(1000 * remaining):
            if descriptor in tails:
                if not tails[descriptor].read(descriptor):
                    poll.unregister(descriptor)
                continue
            message = _receive(ours)
            if message == _END:
                ours.sendall(nonce)
            else:
                passed, ended = message == nonce, True
    seconds = time.monotonic() - began
    # A namespace ends with its first process; without a namespace, the process group is killed.
    for kill, whom in ((os.killpg, program), (os.kill, program)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(whom, signal.SIGKILL)
    # The signal does not change the status of a process that had exited, only of one that had closed its channel.
    _, status, usage = os.wait4(program, 0)
    for descriptor, tail in tails.items():
        os.set_blocking(descriptor, False)
        tail.rest(descriptor)
    answer = {
        "stdout": tails[out].text(),
        "stderr": tails[err].text(),
        "seconds": seconds,
    }
    if passed:
        return {"status": "passed", "detail": "", **answer}
    if not ended:
        detail = f"not done after {limits['wall_seconds']:g} s"
        return {"status": "timed_out", "detail": detail, **answer}
    used = usage.ru_utime + usage.ru_stime
    return {**_verdict(status, used, limits, answer["stderr"]), **answer}


def _receive(ours: socket.socket) -> bytes:
    try:
        return ours.recv(64)
    except ConnectionError:
        return b""


def _verdict(status: int, cpu_seconds: float, limits: dict, stderr: str) -> dict:
    """Returns status and detail of a program that stopped before its end and before the deadline."""
    killer = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    if killer in (signal.SIGKILL, signal.SIGXCPU) and cpu_seconds > 0.9 * limits["cpu_seconds"]:
        return {"status": "timed_out", "detail": f"{limits['cpu_seconds']} s of CPU time used"}
    if killer is not None:
        return {"status": "killed", "detail": f"by {signal.Signals(killer).name}"}
    code = os.WEXITSTATUS(status)
    if code == _NO_MEMORY:
        return {"status": "out_of_memory", "detail": "MemoryError"}
    if code == _RAISED and stderr.strip():
        return {"status": "failed", "detail": stderr.strip().splitlines()[-1]}
    return {"status": "failed", "detail": f"left with status {code} before its end"}


class _Tail:
    """Records the end of a pipe's output; reads all of it, so that the writer never blocks."""

    def __init__(self, size: int):
        self._size = size
        self._parts: collections.deque[bytes] = collections.deque()
        self._held = 0

    def read(self, descriptor: int) -> bool:
        """Reads once; returns False at the end of the pipe."""
        part = os.read(descriptor, 1 << 16)
        self._parts.append(part)
        self._held += len(part)
        while self._held - len(self._parts[0]) >= self._size:
            self._held -= len(self._parts.popleft())
        return bool(part)

    def rest(self, descriptor: int) -> None:
        """Reads the remaining content of the pipe, at most its capacity."""
        try:
            for _ in range(16):
                if not self.read(descriptor):
                    return
        except BlockingIOError:
            pass

    def text(self) -> str:
        return b"".join(self._parts)[-self._size :].decode("utf-8", "replace")


def _become_program(request: dict, state: dict, channel: int, out: int, err: int) -> None:
    """Confines the process further and runs the program; does not return."""
    leave = os._exit
    try:
        limits = state["limits"]
        os.setsid()
        for source, target in ((channel, _DESCRIPTOR), (out, 1), (err, 2)):
            os.dup2(os.dup(source), target)
        os.closerange(_DESCRIPTOR + 1, 256)
        os.chdir(state["work"])
        os.umask(0o077)
        for name, value in (
            ("CPU", limits["cpu_seconds"]),
            ("AS", limits["memory_bytes"]),
            ("DATA", limits["memory_bytes"]),
            ("FSIZE", limits["file_bytes"]),
            ("NOFILE", limits["open_files"]),
            # If they have the same user, the zygote and the supervisor count too.
            ("NPROC", limits["threads"] + (0 if state["becomes_nobody"] else 2)),
            ("CORE", 0),
        ):
            _limit(getattr(resource, f"RLIMIT_{name}"), value)
        if sys.platform == "linux":
            if state["becomes_nobody"]:
                kernel.become_nobody()
            kernel.drop_capabilities()
            kernel.die_with_parent()
            if select.select([_DESCRIPTOR], [], [], 0)[0]:  # the supervisor has ended already
                leave(_RAISED)
        if state["calls"]:
            kernel.filter_system_calls(threads=state["threads"], own_files_only=state["namespaces"])
        _run(request["program"], leave)
    except BaseException as error:  # errors of this function; `_run` catches those of the program
        os.write(2, f"sandbox: {error}".encode())
    finally:
        leave(_RAISED)


def _limit(kind: int, value: int) -> None:
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        if sys.platform == "linux":
            raise
        # macOS refuses limits on memory.


def _run(source: str, leave) -> None:
    # Local names, so that the program cannot replace these functions.
    read, write = os.read, os.write
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", "backslashreplace")
        for number in (1, 2)
    )
    module = types.ModuleType(_NAME)
    sys.modules[_NAME] = module
    try:
        exec(compile(source, f"<{_NAME}>", "exec"), module.__dict__)
    except MemoryError:
        leave(_NO_MEMORY)
    except BaseException as error:
        _say(error)
        leave(_RAISED)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    write(_DESCRIPTOR, _END)
    write(_DESCRIPTOR, read(_DESCRIPTOR, 64))
    leave(0)


def _say(error: BaseException) -> None:
    """Prints a traceback as the interpreter would, with the program's own frames only."""
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    traceback.print_exception(type(error), error, frames, limit=-8)
    sys.stderr.flush()
