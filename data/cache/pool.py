"""Calls a function of each of several items in as many processes as there are cores.

The processes are new ones, not forks: threads of JAX and TensorFlow do not survive a fork. They import what the function's
pickle names, and end with the process that started them, however it ends. Nothing of an item passes through the parent but its
result, so that a call should last for a second or more. One item, or one process, runs here.
"""

import contextlib
import mmap
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any, Protocol, TypeVar, cast

from espalier.common.ranges import Size

T = TypeVar("T")
R = TypeVar("R")
Report = Callable[[int], None]  # adds to what the bar counts

_SHOWN_SECONDS = 0.2  # between two looks at the processes' counts
_COUNT = struct.Struct("q")
_START = "import pickle, sys; sys.path[:] = pickle.loads(bytes.fromhex(sys.argv[1])); from espalier.data.cache import pool; pool.serve(*map(int, sys.argv[2:]))"
# Each process has one core; the libraries would otherwise start as many threads as there are cores.
_ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    **dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    **dict.fromkeys(("MKL_NUM_THREADS", "ARROW_NUM_THREADS"), "1"),
}
_limit: int | None = None
_elsewhere: Callable[..., list[Any]] | None = None


class Counts(dict[str, int]):
    """A result that is counts, such as {'records': 10}. Where calls are made elsewhere, the `sums` of all results are shown."""

    @property
    def sums(self) -> Mapping[str, int]:
        return self


class WorkerError(RuntimeError):
    """A process of the pool has ended before its work was done."""


class Bar(Protocol):
    """A progress bar; tqdm's and that of espalier/common/bars.py are such."""

    n: float

    def update(self, n: float = 1) -> Any: ...

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> Any: ...


@contextlib.contextmanager
def limited(workers: Size | None = None) -> Iterator[None]:
    """Context manager: at most `workers` processes at once; None for no other limit than before.

    Args:
      workers: number of processes that read and tokenise (default: one for each core); the result is the same with any number.

    Raises:
      ValueError: `workers` is less than 1.
    """
    global _limit
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1, or None for all cores")
    before = _limit
    try:
        _limit = before if workers is None else workers
        yield
    finally:
        _limit = before


@contextlib.contextmanager
def elsewhere(run: Callable[..., list[Any]]) -> Iterator[None]:
    """Context manager: calls are not made in processes of this machine, but by `run(function, items, title, paths, last)`."""
    global _elsewhere
    before, _elsewhere = _elsewhere, run
    try:
        yield
    finally:
        _elsewhere = before


def is_elsewhere() -> bool:
    """Returns whether calls are made on other machines."""
    return _elsewhere is not None


def size() -> int:
    """Returns the number of processes that run at once."""
    if _limit is not None:
        return _limit
    with contextlib.suppress(AttributeError):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    function: Callable[[T, Report], R],
    items: Sequence[T],
    *,
    what: Callable[[T], str],
    bar: Bar,
    unit: str = "",
    title: str = "at work",
    remedy: str = "",
    paths: Sequence[str] = (),
    last: Callable[[], None] | None = None,
) -> list[R]:
    """Returns the results of `function(item, report)`, in the order of the items.

    If a call raises, the calls for earlier items are still waited for: the error is the one that a single process would raise.

    Args:
      function: picklable, or else everything runs in this process, which a message says. Results and errors are pickled too.
      items: the items, picklable.
      what: names an item in an error.
      bar: shows the sum of what the calls report.
      unit: of the items; the bar also shows how many are done.
      title: what the calls do.
      remedy: what to do when a process has died, besides starting fewer.
      paths: files and folders that the calls read or write; elsewhere, they must be there too.
      last: called once all calls have returned; picklable.

    Raises:
      WorkerError: a process was killed, such as when memory is exhausted.
      Exception: what a call raises.
    """
    if _elsewhere is not None and items:
        return _elsewhere(function, items, title, paths, last)
    results = _in_processes(function, items, what, bar, unit, remedy)
    if last is not None:
        last()
    return results


def _in_processes(
    function: Callable[[T, Report], R],
    items: Sequence[T],
    what: Callable[[T], str],
    bar: Bar,
    unit: str,
    remedy: str,
) -> list[R]:
    workers = min(size(), len(items))
    pickled = _pickled(function, items) if workers > 1 else None
    if pickled is None:
        results: list[R] = []
        for item in items:
            _show(bar, len(results), len(items), unit)
            results.append(function(item, lambda count: bar.update(count)))
        return results
    with _Processes(workers, pickled) as processes:
        return processes.results([what(item) for item in items], bar, unit, remedy)


def _show(bar: Bar, done: int, total: int, unit: str) -> None:
    if unit:
        bar.set_postfix_str(f"{done:,} of {total:,} {unit}", refresh=False)


def _pickled(function: Any, items: Any) -> bytes | None:
    """Returns a pickle that another process can read; None if there is none."""
    try:
        pickled = pickle.dumps((function, items))
        reason = "a part of it is defined in __main__" if b"__main__" in pickled else ""
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        pickled, reason = b"", str(error)
    if reason:
        print(f"in one process, since others cannot load it: {reason}", file=sys.stderr, flush=True)
        return None
    return pickled


class _Processes:
    """The processes of one `run`. A context manager, which kills them at its end."""

    def __init__(self, count: int, pickled: bytes):
        self._end = contextlib.ExitStack()
        file = self._end.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        file.truncate(_COUNT.size * count)
        self._counts = self._end.enter_context(mmap.mmap(file.fileno(), _COUNT.size * count))
        self._processes: dict[connection.Connection, subprocess.Popen] = {}
        try:
            for number in range(count):
                self._start(number, file.fileno())
            for channel in self._processes:
                with contextlib.suppress(BrokenPipeError):  # it has died; `results` says so
                    channel.send_bytes(pickled)
        except BaseException:
            self.__exit__()
            raise

    def _start(self, number: int, counts: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            channel = connection.Connection(ours.detach())
            self._end.callback(channel.close)
            arguments = [pickle.dumps(sys.path).hex(), theirs.fileno(), counts, number]
            self._processes[channel] = subprocess.Popen(
                [sys.executable, "-c", _START, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a function prints must not be taken for what the command answers
                pass_fds=(theirs.fileno(), counts),
                env={**os.environ, **_ONE_THREAD},
            )

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._end.close()

    def results(self, names: Sequence[str], bar: Bar, unit: str, remedy: str) -> list[Any]:
        """Hands out the items in order; see `run`."""
        results: dict[int, Any] = {}
        failed: dict[int, BaseException] = {}
        at_work: dict[connection.Connection, int] = {}
        waiting = iter(range(len(names)))
        for channel in self._processes:
            at_work[channel] = self._hand_out(channel, next(waiting))
        while at_work:
            for ready in connection.wait(list(at_work), _SHOWN_SECONDS):
                channel = cast("connection.Connection", ready)
                number = at_work.pop(channel)
                try:
                    error, value = pickle.loads(channel.recv_bytes())
                except (EOFError, ConnectionError):
                    raise self._died(channel, names[number], remedy) from None
                (failed if error else results)[number] = value
                following = None if failed else next(waiting, None)
                if following is not None:
                    at_work[channel] = self._hand_out(channel, following)
            _show(bar, len(results), len(names), unit)
            bar.update(sum(count for (count,) in _COUNT.iter_unpack(self._counts[:])) - bar.n)
            if failed and not any(number < min(failed) for number in at_work.values()):
                raise failed[min(failed)]
        return [results[number] for number in range(len(names))]

    @staticmethod
    def _hand_out(channel: connection.Connection, number: int) -> int:
        with contextlib.suppress(BrokenPipeError):  # it has died; reading its answer says so
            channel.send_bytes(_COUNT.pack(number))
        return number

    def _died(self, channel: connection.Connection, name: str, remedy: str) -> WorkerError:
        code = self._processes[channel].wait()
        how = f"ended with status {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", as the system does when memory is exhausted"
        return WorkerError(
            f"{name}: its process {how}. Use fewer processes (--workers) if memory is short. {remedy}".rstrip()
        )


def serve(channel: int, counts: int, number: int) -> None:
    """Runs a process of the pool: calls the function for the items that the parent names; ends with the parent.

    Args:
      channel: handle of a socket to the parent.
      counts: handle of the file of counts.
      number: place of this process' count.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the parent, which ends this process
    parent = connection.Connection(channel)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                requests.put(parent.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    shared = mmap.mmap(counts, 0)
    counted = 0

    def report(count: int) -> None:
        nonlocal counted
        counted += count
        _COUNT.pack_into(shared, _COUNT.size * number, counted)

    function, items = pickle.loads(requests.get())
    while True:
        (index,) = _COUNT.unpack(requests.get())
        try:
            answer = (False, function(items[index], report))
        except Exception as error:
            error.add_note(f"In a process of the pool:\n{traceback.format_exc()}")
            answer = (True, error)
        parent.send_bytes(_pickled_answer(*answer))


def _pickled_answer(failed: bool, value: Any) -> bytes:
    try:
        pickled = pickle.dumps((failed, value))
        if failed:  # of some errors, only the reading fails
            pickle.loads(pickled)
        return pickled
    except Exception as error:
        text = "".join(traceback.format_exception(value if failed else error))
        return pickle.dumps((True, RuntimeError(text)))
