"""The process inside `data.sandbox.code_sandbox`: a bare interpreter that confines itself and runs programs.

It reads requests from standard input. For each request it forks a supervisor, which forks the program and answers
on standard output. All these processes have empty environments and no packages. The command is

  python -S -s -P -c "import sys; sys.path.insert(0, ROOT); from espalier.data.sandbox import sandbox_zygote as z; z.main()"

A message is its length in 4 bytes, followed by JSON. A program passes if it runs to its end. The proof is a random
number of the supervisor, which the process returns after the program. While the program runs, the number is in the
interpreter's evaluation stack only, where no variable, frame or garbage collector shows it to Python code. Code that
reads raw memory, such as with ctypes, can find it.
"""

import collections
import contextlib
import functools
import gc
import importlib
import io
import itertools
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import sysconfig
import time
import traceback
import types
from collections.abc import Iterator

from espalier.data.sandbox import sandbox_calls, work_folder
from espalier.data.sandbox import sandbox_kernel as kernel

# Imported before the forks, so that programs import them at no cost.
_LOADED = ("bisect", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools")
_LOADED += ("heapq", "itertools", "math", "operator", "random", "re", "statistics", "string")
_LOADED += ("typing",)
_RAISED, _NO_MEMORY = 1, 3
_DESCRIPTOR, _NONCE_BYTES = 3, 16
_WORK = "/sandbox"  # a folder in the new root, without an interpreter
_REMOVAL_SECONDS = 10.0  # for the files of a program; the rest is removed when the sandbox closes
_UNUSED_USERS = 0x70000000  # ids from here on belong to no user, service or container by convention
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
    for number in itertools.count():
        with _work_folder(state, number) as folder:
            if (request := receive(requests)) is None:
                return
            supervisor = os.fork()
            if not supervisor:
                os.close(requests)
                _answer(answers, request, state | {"work": folder}, own)
            if os.waitpid(supervisor, 0)[1]:
                return  # it may not have answered; the sandbox starts a new process and runs the program again


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
    calls = sandbox_calls.knows_system_calls()
    namespaces = linux and setup["namespaces"]
    state = {
        "limits": setup["limits"],
        "namespaces": namespaces,
        "calls": calls,
        "readable": readable(),
    }
    by: dict[str, str | None] = {}
    if namespaces:
        state["work"] = _WORK
        kernel.enter_namespaces(state["readable"], _WORK)
        by = dict.fromkeys(("network", "files", "processes"), "namespaces")
    else:
        state["work"] = setup["work"]
        by = dict.fromkeys(("network", "processes"), "seccomp" if calls else None)
        by["files"] = None
        if calls:
            with contextlib.suppress(OSError):
                kernel.restrict_files(state["readable"], [setup["work"]])
                by["files"] = "Landlock and seccomp"
    if calls and namespaces:
        by = {name: f"{what} and seccomp" for name, what in by.items()}
    # Without it, programs could not import from a library that only root can read.
    needs_all = linux and not _everyone_reads(sysconfig.get_path("stdlib"))
    state["reads_all"] = needs_all and kernel.may_read_all()
    user = None if needs_all and not state["reads_all"] else _choose_user(state)
    state |= {
        "user": user,
        "landlock": not namespaces and by["files"] is not None,
        "threads": user is not None or os.geteuid() != 0,  # the limit on threads does not bind root
    }
    state["protections"] = {**by, "root": os.geteuid() == 0 and user is None}
    return state


def _choose_user(state: dict) -> int | None:
    """Returns the user that programs of root run as; None to stay the same user.

    A namespace has the user nobody. Without one, each worker has its own user, so that its programs share no limit on
    threads with others, or nobody if the kernel does not know such users.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        return None
    if state["namespaces"]:
        return kernel.NOBODY
    os.chmod(state["work"], 0o710)  # programs pass through it to their folder
    for user in (_UNUSED_USERS + os.getpid(), kernel.NOBODY):
        with contextlib.suppress(OSError):
            os.chown(state["work"], -1, user)
            return user
    return None


def _everyone_reads(path: str) -> bool:
    while os.stat(path).st_mode & 0o005 == 0o005:
        if path == "/":
            return True
        path = os.path.dirname(path)
    return False


@contextlib.contextmanager
def _work_folder(state: dict, number: int) -> Iterator[str]:
    """Makes the empty folder of one program and removes it with everything in it."""
    if state["namespaces"]:
        kernel.mount_work(state["work"], state["limits"]["work_bytes"])
        yield state["work"]
        kernel.unmount_work(state["work"])
    else:
        folder = os.path.join(state["work"], str(number))
        os.mkdir(folder, 0o700)
        if state["user"] is not None:
            os.chown(folder, state["user"], state["user"])
        yield folder
        work_folder.remove(folder, seconds=_REMOVAL_SECONDS)


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
    nonce = os.urandom(_NONCE_BYTES)  # made after the fork, so that the program has no copy of it
    ours.sendall(nonce)
    for descriptor in (out_end, err_end):
        os.close(descriptor)
    theirs.close()
    tails = {out: _Tail(limits["output_bytes"]), err: _Tail(limits["output_bytes"])}
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
            passed, ended = _receive(ours) == nonce, True
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
    # The kernel counts whole ticks against the limit, on a busy machine more than the time used.
    if killer in (signal.SIGKILL, signal.SIGXCPU) and cpu_seconds > 0.5 * limits["cpu_seconds"]:
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
        # Opened for each program, which could leave a lock or flags on a shared input.
        empty = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((empty, 0), (channel, _DESCRIPTOR), (out, 1), (err, 2)):
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
            ("NPROC", limits["threads"] + (2 if state["user"] is None else 0)),
            ("CORE", 0),
        ):
            _limit(getattr(resource, f"RLIMIT_{name}"), value)
        if sys.platform == "linux":
            if state["landlock"]:
                kernel.restrict_files(state["readable"], [state["work"]])
            if state["user"] is not None:
                kernel.become_user(state["user"])
            kernel.drop_capabilities(keep_reading=state["reads_all"])
            kernel.hide_memory()
            kernel.die_with_parent()
            hang_up = select.poll()
            hang_up.register(_DESCRIPTOR, 0)
            if hang_up.poll(0):  # the supervisor has ended already
                leave(_RAISED)
        if state["calls"]:
            sandbox_calls.filter_system_calls(
                threads=state["threads"], own_files_only=state["namespaces"]
            )
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
    program = functools.partial(_execute, source)
    try:
        # One expression: the number that proves the end stays on the stack while the program runs. `_execute`
        # returns None, and is called by `partial`, because an interpreter that calls Python code directly lets the
        # garbage collector see the stack of the caller.
        write(_DESCRIPTOR, read(_DESCRIPTOR, _NONCE_BYTES)[program() :])
    except MemoryError:
        leave(_NO_MEMORY)
    except BaseException as error:
        _say(error)
        leave(_RAISED)
    leave(0)


def _execute(source: str) -> None:
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", "backslashreplace")
        for number in (1, 2)
    )
    module = types.ModuleType(_NAME)
    sys.modules[_NAME] = module
    exec(compile(source, f"<{_NAME}>", "exec"), module.__dict__)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()


def _say(error: BaseException) -> None:
    """Prints a traceback as the interpreter would, with the program's own frames only."""
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames, limit=-8)
    sys.stderr.flush()
