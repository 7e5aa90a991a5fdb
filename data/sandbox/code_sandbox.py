"""Runs untrusted Python programs, and tells which of them come to their end.

A program is a text: a solution and, after it, the tests of it. It runs in a process of its own,
without packages, with an empty environment and limits on everything it can use. On Linux it has no
network, sees no files but the standard library and an empty folder that is emptied after it, and can
start, signal or see no other process, by as much of this as the kernel offers: namespaces and seccomp;
where namespaces are forbidden, Landlock and seccomp. On macOS there are the limits alone. `Protections`
says what there is, and people are told once where the network or files are open.

What a program prints, its exit status or handlers it registers do not make it pass: only its end does.
But tests run in the interpreter of what they test, so that a program written against its tests (an
object equal to everything, a trace function that skips asserts) or against this very module can
pass without solving anything. The limits hold for these too.
"""

import collections
import concurrent.futures
import dataclasses
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import tqdm

from data.sandbox import sandbox_zygote

Status = Literal["passed", "failed", "timed_out", "out_of_memory", "killed", "refused"]
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_START = (
    "import sys; sys.path.insert(0, sys.argv.pop()); from data.sandbox import sandbox_zygote as zygote; "
    "zygote.main()"
)
_GRACE_SECONDS = (
    60.0  # for a start, and for an answer after the deadline, on a machine with much to do
)
_BLOCKED = ("network", "files")


class SandboxError(RuntimeError):
    """The sandbox cannot be made as asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use.

    Attributes:
      cpu_seconds: of processor time, all threads together.
      wall_seconds: from its start.
      memory_bytes: of address space.
      threads: at once; it may start no processes.
      file_bytes: of one file.
      work_bytes: of all its files; only with namespaces.
      open_files: at once.
      output_bytes: that are kept of the end of standard output, and of standard error.
      program_bytes: of its text; a longer one is refused.
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
    """By what programs are kept from something, None where nothing does.

    Attributes:
      network: connections.
      files: other files than the library and their own.
      processes: starting, signalling and seeing other processes.
    """

    network: str | None
    files: str | None
    processes: str | None


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a program.

    Attributes:
      status: `passed`, it ran to its end; `failed`, an exception, or it left before its end;
        `timed_out`; `out_of_memory`; `killed`, by a signal such as that of a crash; `refused`, not
        run, as it is too long or no Unicode.
      detail: why it did not pass, in a line.
      stdout: the end of what it printed.
      stderr: the same of errors.
      seconds: it took.
      protections: it ran under.
    """

    status: Status
    detail: str
    stdout: str
    stderr: str
    seconds: float
    protections: Protections

    @property
    def passed(self) -> bool:
        return self.status == "passed"


class Sandbox:
    """Runs programs, several at a time. A context manager, after which no process is left.

    Args:
      limits: of each program.
      workers: programs at a time; default one a processor.
      namespaces: False to do without them, as on kernels that forbid them.
      require: of "network", "files" and "processes", what must be protected.

    Raises:
      SandboxError: what is required is not to be had here, or the platform has no such processes.
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
        self._folder = tempfile.TemporaryDirectory(prefix="espalier_sandbox_")
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
        """Ends all processes."""
        self._threads.shutdown(cancel_futures=True)
        for zygote in self._all:
            zygote.close()
        self._all.clear()
        self._folder.cleanup()

    def run(self, programs: Sequence[str], *, title: str = "programs") -> Iterator[Result]:
        """Results of programs, in order, as they are there; with a progress bar."""
        futures = [self.submit(program) for program in programs]
        try:
            for future in tqdm.tqdm(futures, desc=title, file=sys.stderr, disable=None):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def submit(self, program: str) -> concurrent.futures.Future[Result]:
        """Runs a program as soon as there is a worker for it."""
        return self._threads.submit(self.run_one, program)

    def run_one(self, program: str) -> Result:
        """Runs one program; no more at a time than there are workers."""
        try:
            size = len(program.encode("utf-8"))
        except UnicodeEncodeError as error:
            return self._refused(f"not valid Unicode at character {error.start}")
        if size > self.limits.program_bytes:
            return self._refused(f"{size} bytes, more than {self.limits.program_bytes}")
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
        found = {"stdout": "", "stderr": "", "seconds": 0.0, **answer}
        return Result(**found, protections=self.protections)

    def _refused(self, why: str) -> Result:
        return Result("refused", why, "", "", 0.0, self.protections)

    def _first(self, require: Sequence[str]) -> Protections:
        """Starts the first process, without namespaces where there are none."""
        try:
            found = self._start()
        except SandboxError:
            if not self._namespaces:
                raise
            self._namespaces = False
            found = self._start()
        missing = [name for name in require if getattr(found, name) is None]
        if missing:
            raise SandboxError(
                f"Programs cannot be kept from {' and '.join(missing)} here: that takes Linux with "
                "namespaces, or with Landlock and seccomp."
            )
        _warn(found)
        return found

    def _start(self) -> Protections:
        zygote = _Zygote(self.limits, self._folder.name, namespaces=self._namespaces)
        self._all.append(zygote)
        self._free.append(zygote)
        return zygote.protections


class _ZygoteLostError(RuntimeError):
    """The process that runs programs is gone or does not answer."""


class _Zygote:
    """A process that runs programs one after the other."""

    def __init__(self, limits: Limits, parent: str, *, namespaces: bool):
        self._limits = limits
        work = tempfile.mkdtemp(dir=parent)
        if os.geteuid() == 0:  # programs are nobody's then
            os.chmod(parent, 0o711)
        with tempfile.TemporaryFile() as said:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-X", "utf8", "-c", _START, _ROOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                cwd="/",
                # Sets have an order then, which verdicts may depend on.
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
            setup = {
                "work": work,
                "limits": dataclasses.asdict(limits),
                "namespaces": namespaces,
            }
            try:
                answer = self._exchange(setup, _GRACE_SECONDS)
            except _ZygoteLostError as error:
                said.seek(0)
                lines = said.read().decode("utf-8", "replace").strip().splitlines()
                answer = {"error": lines[-1] if lines else str(error)}
        if "error" in answer:
            self.close()
            raise SandboxError(f"No sandbox can be made here: {answer['error']}.")
        self.protections = Protections(**answer["protections"])

    def ask(self, program: str) -> dict:
        """Runs a program; what `Result` has but its protections."""
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
        self._process.kill()  # its supervisors end with it, their programs with them
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_warned: set[Protections] = set()


def _warn(found: Protections) -> None:
    """Says once what programs that are run here can reach."""
    open_ = [name for name in _BLOCKED if getattr(found, name) is None]
    if open_ and found not in _warned:
        _warned.add(found)
        print(
            f"warning: untrusted programs run with limits on time and memory, but can reach "
            f"{' and '.join(open_)} here. Use Linux with namespaces or Landlock, a container or a "
            "virtual machine for programs you do not trust.",
            file=sys.stderr,
        )
