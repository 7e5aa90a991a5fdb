"""Runs untrusted Python programs in a sandbox; a program passes if it runs to its end.

A program is a text: a solution, followed by its tests. It runs in a separate process without packages, with an
empty environment and with limits on its resources. On Linux it has no network, sees only the standard library
and an empty work folder of its own, and cannot start, signal or see other processes. The protections are
namespaces and seccomp, or Landlock and seccomp where namespaces are forbidden; a kernel may offer only some of
them. Programs of root run as another user. macOS has the limits only. `Protections` lists the active protections,
and a warning is printed once if the network or files are reachable, or if programs run as root. docs/reference/code_sandbox.md
lists what is not protected.

Output, exit status and exit handlers of a program do not make it pass; only running to its end does, which it
proves with a random number that Python code cannot reach before. But tests run in the same interpreter as the
solution. So a program that targets its tests (an object equal to everything, a trace function that skips asserts)
or reads its own raw memory can pass without a solution. It never changes the result of another program.
"""

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from espalier.common.bars import Bar
from espalier.data.sandbox import sandbox_zygote, work_folder

Status = Literal["passed", "failed", "timed_out", "out_of_memory", "killed", "refused"]
_ROOT = str(pathlib.Path(__file__).absolute().parents[3])  # from which the package is imported
_START = (
    "import sys; sys.path.insert(0, sys.argv.pop()); from espalier.data.sandbox import sandbox_zygote as zygote; "
    "zygote.main()"
)
_GRACE_SECONDS = 60.0  # for a start, and for an answer after the deadline, on a busy machine
_BLOCKED = ("network", "files")


class SandboxError(RuntimeError):
    """Raised if the requested sandbox cannot be created."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of one program.

    Attributes:
      cpu_seconds: CPU time of all threads together.
      wall_seconds: wall time since the program's start.
      memory_bytes: size of the address space.
      threads: number of threads at a time; a program cannot start processes.
      file_bytes: size of one file.
      work_bytes: size of all files together; applies with namespaces only.
      open_files: number of open files at a time.
      output_bytes: length of the recorded end of standard output, and of standard error.
      program_bytes: length of the program; longer ones are refused.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_bytes: int = 512 << 20
    threads: int = 16
    file_bytes: int = 16 << 20
    work_bytes: int = 64 << 20
    open_files: int = 32
    output_bytes: int = 2000
    program_bytes: int = 1 << 20

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"Limits.{field.name} = {value} must be above 0.")
        if self.cpu_seconds != int(self.cpu_seconds):
            raise ValueError(f"Limits.cpu_seconds = {self.cpu_seconds} must be whole seconds.")


@dataclasses.dataclass(frozen=True)
class Protections:
    """The mechanism that blocks each kind of access, such as 'namespaces'; None if the access is possible."""

    network: str | None  # access to the network
    files: str | None  # access to files other than the standard library and the program's own
    processes: str | None  # starting, signalling and seeing other processes
    root: bool = False  # whether programs keep the user id of root, without its privileges


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a program."""

    # `passed`: the program ran to its end; `failed`: it raised an exception or exited before its
    # end; `timed_out`; `out_of_memory`; `killed`: a signal ended it, for example in a crash, or
    # twice the process that ran it;
    # `refused`: it did not run, because it is too long or not valid Unicode
    status: Status
    detail: str  # one line on why the program did not pass
    stdout: str  # the end of its standard output
    stderr: str  # the end of its standard error
    seconds: float  # wall time of the program
    protections: Protections  # protections during the run

    @property
    def passed(self) -> bool:
        return self.status == "passed"


class Sandbox:
    """Runs several programs at a time. A context manager that ends all its processes on exit.

    Args:
      limits: limits of each program.
      workers: number of programs that run at a time; default one per processor.
      namespaces: False to use no namespaces, as on kernels that forbid them.
      require: the protections that must be active, out of "network", "files" and "processes".

    Raises:
      SandboxError: a required protection is not available, or the platform is neither Linux nor macOS.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        namespaces: bool = True,
        require: Sequence[str] = (),
    ):
        if os.name != "posix":
            raise SandboxError("Programs are run on Linux and macOS only.")
        self.limits = Limits() if limits is None else limits
        self._namespaces = namespaces and sys.platform == "linux"
        count = workers or _processors()
        self._folder = tempfile.TemporaryDirectory(
            prefix="espalier_sandbox_", ignore_cleanup_errors=True
        )
        self._free: collections.deque[_Zygote] = collections.deque()
        self._all: list[_Zygote] = []
        self._threads = concurrent.futures.ThreadPoolExecutor(count)
        try:
            self.protections = self._first(require)
            while len(self._all) < count:
                self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes and removes their files."""
        self._threads.shutdown(cancel_futures=True)
        for zygote in self._all:
            zygote.close()
        self._all.clear()
        # A program whose process was lost may live for a moment and write.
        if not work_folder.remove(self._folder.name):
            time.sleep(1.0)
        if not work_folder.remove(self._folder.name):
            print(f"warning: {self._folder.name} could not be removed.", file=sys.stderr)
        self._folder.cleanup()

    def run(self, programs: Sequence[str], *, title: str = "programs") -> Iterator[Result]:
        """Yields the results of programs in order, as soon as they are ready; shows a progress bar."""
        futures = [self.submit(program) for program in programs]
        try:
            for future in Bar(futures, desc=title, file=sys.stderr):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def submit(self, program: str) -> concurrent.futures.Future[Result]:
        """Runs a program as soon as a worker is free; returns a future of its result."""
        return self._threads.submit(self.run_one, program)

    def run_one(self, program: str) -> Result:
        """Runs one program and returns its result; at most `workers` threads may call this at a time."""
        try:
            size = len(program.encode("utf-8"))
        except UnicodeEncodeError as error:
            return self._refused(f"not valid Unicode at character {error.start}")
        if size > self.limits.program_bytes:
            return self._refused(f"{size} bytes, more than {self.limits.program_bytes}")
        for _ in range(2):  # a lost process is rarely the program's doing
            zygote = self._free.popleft()
            try:
                answer = zygote.ask(program)
            except _ZygoteLostError as error:
                self._all.remove(zygote)
                zygote.close()
                self._start()
                answer = {"status": "killed", "detail": str(error)}
            else:
                self._free.append(zygote)
                break
        fields = {"stdout": "", "stderr": "", "seconds": 0.0, **answer}
        return Result(**fields, protections=self.protections)

    def _refused(self, why: str) -> Result:
        return Result("refused", why, "", "", 0.0, self.protections)

    def _first(self, require: Sequence[str]) -> Protections:
        """Starts the first process, without namespaces if they are not available; returns its protections."""
        try:
            protections = self._start()
        except SandboxError:
            if not self._namespaces:
                raise
            self._namespaces = False
            protections = self._start()
        missing = [name for name in require if getattr(protections, name) is None]
        if missing:
            raise SandboxError(
                f"The sandbox cannot block {' and '.join(missing)} on this machine: this needs Linux with "
                "namespaces, or with Landlock and seccomp."
            )
        _warn(protections)
        return protections

    def _start(self) -> Protections:
        zygote = _Zygote(self.limits, self._folder.name, namespaces=self._namespaces)
        self._all.append(zygote)
        self._free.append(zygote)
        return zygote.protections


class _ZygoteLostError(RuntimeError):
    """Raised if the process that runs programs has ended or does not answer."""


class _Zygote:
    """A process that runs one program after another."""

    def __init__(self, limits: Limits, parent: str, *, namespaces: bool):
        self._limits = limits
        work = tempfile.mkdtemp(dir=parent)
        if os.geteuid() == 0:  # programs then run as the user nobody
            os.chmod(parent, 0o711)
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-B", "-S", "-s", "-P", "-X", "utf8", "-c", _START, _ROOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd="/",
                # A fixed hash seed fixes the order of sets, on which verdicts may depend.
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
            setup = {"work": work, "limits": dataclasses.asdict(limits), "namespaces": namespaces}
            try:
                answer = self._exchange(setup, _GRACE_SECONDS)
            except _ZygoteLostError as error:
                errors.seek(0)
                lines = errors.read().decode("utf-8", "replace").strip().splitlines()
                answer = {"error": lines[-1] if lines else str(error)}
        if "error" in answer:
            self.close()
            raise SandboxError(f"The sandbox cannot start on this machine: {answer['error']}.")
        self.protections = Protections(**answer["protections"])

    def ask(self, program: str) -> dict:
        """Runs a program; returns the fields of its `Result`, without the protections."""
        return self._exchange({"program": program}, self._limits.wall_seconds + _GRACE_SECONDS)

    def _exchange(self, message: dict, seconds: float) -> dict:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            sandbox_zygote.send(process.stdin.fileno(), message)
        except BrokenPipeError:
            raise _ZygoteLostError("the sandbox's own process was killed") from None
        deadline = time.monotonic() + seconds
        if not select.select([process.stdout], [], [], deadline - time.monotonic())[0]:
            raise _ZygoteLostError("the sandbox's own process did not answer")
        answer = sandbox_zygote.receive(process.stdout.fileno())
        if answer is None:
            raise _ZygoteLostError("the sandbox's own process was killed")
        return answer

    def close(self) -> None:
        self._process.kill()  # its supervisors end with it, and their programs with them
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_warned: set[Protections] = set()


def _warn(protections: Protections) -> None:
    """Prints a warning, once, if programs can reach the network or files or stay root."""
    if protections in _warned:
        return
    _warned.add(protections)
    if protections.root:
        print(
            "warning: untrusted programs keep the user id of root, without its privileges, because other users "
            f"cannot read the Python library of {sys.base_prefix}. Make it and its parent folders readable "
            "(chmod o+rx), or start the command as another user.",
            file=sys.stderr,
        )
    open_ = [name for name in _BLOCKED if getattr(protections, name) is None]
    if open_:
        print(
            "warning: untrusted programs run with limits on time and memory, but can access "
            f"{' and '.join(open_)}. Use Linux with namespaces or Landlock, a container or a virtual "
            "machine for programs you do not trust.",
            file=sys.stderr,
        )
