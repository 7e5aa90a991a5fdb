"""Runs jobs as processes of this machine, several at a time, within its cores and a memory budget."""

import contextlib
import dataclasses
import itertools
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import psutil

from espalier.launch import environment
from espalier.launch.submit.base import Handle, Job, State, Status
from espalier.launch.submit.worker import peak_bytes

# A worker that is idle for this long is ended, so that its memory is free for others.
IDLE_SECONDS = 20.0
# Time between measurements of memory; each takes milliseconds to find a worker's children.
_MEASURE_SECONDS = 2.0


@dataclasses.dataclass
class _Entry:
    """A job with its status and worker."""

    job: Job
    status: Status = Status(state=State.WAITING)
    worker: "_Worker | None" = None
    began: float = 0.0
    measure_at: float = 0.0


class LocalSubmitter:
    """Runs jobs in at most `workers` processes; each process runs one job after another.

    To start Python, import a run's modules and compile small programs takes longer than many small runs. So a worker
    is reused for the next job as long as its jobs succeed. A worker that has died, or whose job has failed, is
    replaced. Each worker has a fixed, equal share of the cores, even while other workers are idle, because the
    rounding of sums depends on the number of threads.

    Attributes:
      shares: the cores of each worker.
    """

    def __init__(self, *, workers: int = 1, memory_gb: float | None = None):
        """Creates the submitter; processes start with the first jobs.

        Jobs that together need more than `memory_gb` GB do not run at the same time. With this budget, a job whose need
        is unknown, from `Job.memory_gb` and from its kind, runs alone.

        Raises:
          ValueError: `workers` is not in [1, number of cores], or `memory_gb` is not positive.
        """
        cores = _cores()
        if not 1 <= workers <= len(cores):
            raise ValueError(
                f"--workers {workers}: this process may use {len(cores)} cores; give 1 to {len(cores)}."
            )
        if memory_gb is not None and memory_gb <= 0:
            raise ValueError(f"--memory_gb {memory_gb}: give a positive number of GB.")
        size = len(cores) // workers
        self.shares = tuple(tuple(cores[i * size : (i + 1) * size]) for i in range(workers))
        self._memory_gb = memory_gb
        self._workers: list[_Worker | None] = [None] * workers
        self._entries: dict[Handle, _Entry] = {}
        self._measured: dict[str, float] = {}  # peak by kind
        self._numbers = itertools.count()

    def submit(self, job: Job) -> Handle:
        handle = f"{next(self._numbers)}-{job.name}"
        self._entries[handle] = _Entry(job)
        return handle

    def preview(self) -> str:
        """Returns the commands of the submitted jobs, as a shell reads them."""
        return "".join(f"{_shell_line(entry.job)}\n" for entry in self._entries.values())

    def statuses(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        self._collect()
        self._start()
        self._retire()
        return {handle: self._entries[handle].status for handle in handles}

    def cancel(self, handle: Handle) -> None:
        entry = self._entries[handle]
        if entry.status.state is State.WAITING:
            entry.status = Status(state=State.DROPPED)
        elif entry.worker is not None:
            entry.worker.signal(signal.SIGTERM)

    def close(self) -> None:
        for worker in self._workers:
            if worker is not None:
                worker.kill()
        self._collect()
        for entry in self._entries.values():
            if entry.status.state is State.WAITING:
                entry.status = Status(state=State.DROPPED)

    def _collect(self) -> None:
        """Updates the status of running jobs."""
        for entry in self._entries.values():
            worker = entry.worker
            if worker is None:
                continue
            seconds = time.monotonic() - entry.began
            reply = worker.reply()
            if reply is None:
                memory = entry.status.memory_gb or 0.0
                if seconds >= entry.measure_at:
                    memory = max(worker.memory_gb(), memory)
                    entry.measure_at = seconds + _MEASURE_SECONDS
                entry.status = Status(
                    state=State.RUNNING, seconds=seconds, memory_gb=memory or None
                )
                continue
            status, memory = reply[0], max(reply[1], entry.status.memory_gb or 0.0)
            entry.status = Status(
                state=State.ENDED, exit_status=status, seconds=seconds, memory_gb=memory or None
            )
            entry.worker = None
            if memory:
                kind = entry.job.kind
                self._measured[kind] = max(self._measured.get(kind, 0.0), memory)
            if status != 0:  # the state of the process after a failed job is unknown
                worker.kill()

    def _start(self) -> None:
        """Starts waiting jobs in the order of submission, as long as workers and memory suffice."""
        for entry in self._entries.values():
            if entry.status.state is not State.WAITING:
                continue
            before = [self._entries[handle].status for handle in entry.job.after]
            ended = [status for status in before if status.state is State.ENDED]
            lost = any(status.state is State.DROPPED for status in before)
            if lost or any(status.exit_status != 0 for status in ended):
                entry.status = Status(state=State.DROPPED)
            elif len(ended) == len(before) and self._fits(entry.job):
                worker = self._free_worker(entry.job)
                if worker is None:
                    return
                entry.worker, entry.began = worker, time.monotonic()
                entry.status = Status(state=State.RUNNING)
                worker.start(entry.job)

    def _need(self, job: Job) -> float | None:
        return self._measured.get(job.kind, job.memory_gb)

    def _fits(self, job: Job) -> bool:
        running = [entry for entry in self._entries.values() if entry.worker is not None]
        if self._memory_gb is None or not running:
            return True
        needs = [self._need(entry.job) for entry in running]
        mine = self._need(job)
        if mine is None or None in needs:
            return False
        # A job may already have used more than its estimate.
        peaks = [entry.status.memory_gb or 0.0 for entry in running]
        held = sum(max(need or 0.0, peak) for need, peak in zip(needs, peaks, strict=True))
        return held + mine <= self._memory_gb

    def _free_worker(self, job: Job) -> "_Worker | None":
        """Returns an idle worker with the job's environment, or a new one; None if all are busy."""
        idle = [i for i, w in enumerate(self._workers) if w is None or not w.busy]
        # Running workers come before empty slots.
        for i in sorted(idle, key=lambda i: self._workers[i] is None):
            worker = self._workers[i]
            if worker is not None and worker.alive and worker.environment == job.environment:
                return worker
            if worker is not None:
                worker.kill()
            self._workers[i] = worker = _Worker(self.shares[i], job)
            return worker
        return None

    def _retire(self) -> None:
        """Ends workers that have been idle for IDLE_SECONDS, and removes dead ones."""
        now = time.monotonic()
        for i, worker in enumerate(self._workers):
            if worker is None or worker.busy:
                continue
            if not worker.alive or now - worker.since > IDLE_SECONDS:
                worker.kill()
                self._workers[i] = None


def _shell_line(job: Job) -> str:
    variables = [f"{name}={shlex.quote(value)}" for name, value in job.environment.items()]
    return " ".join([*variables, shlex.join(job.command)])


def _cores() -> list[int]:
    """Returns the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class _Worker:
    """A process that serves jobs (launch/submit/worker.py).

    Attributes:
      environment: environment variables of its jobs.
      busy: whether it runs a job.
      since: value of time.monotonic() when its last job began or ended.
    """

    def __init__(self, cores: Sequence[int], job: Job):
        self.environment = job.environment
        self.busy = False
        self.since = time.monotonic()
        paths = [environment.IMPORTED_FROM, *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "ESPALIER_WORKER_CORES": ",".join(map(str, cores)),
            **job.environment,
        }
        with open(job.log, "ab") as log:  # for errors before the first job runs
            self._process = subprocess.Popen(
                [sys.executable, "-m", "espalier.launch.submit.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=variables,
                start_new_session=True,  # Ctrl-C in the terminal is for the driver
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def start(self, job: Job) -> None:
        self.busy = True
        self.since = time.monotonic()
        message = json.dumps({"command": job.command, "log": job.log}) + "\n"
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has died; `reply` reports this
            self._process.stdin.write(message.encode())
            self._process.stdin.flush()

    def reply(self) -> tuple[int, float] | None:
        """Returns exit status and peak memory in GB (0 if unknown) of the job; None while it runs."""
        assert self._process.stdout is not None
        alive = self.alive  # before the output, which may be written just before the process ends
        killed = self._process.stdout.closed
        if not killed and select.select([self._process.stdout], [], [], 0)[0]:
            if line := self._process.stdout.readline():
                self._ended()
                answer = json.loads(line)
                return answer["status"], answer["memory_gb"]
            self._process.wait()
            alive = False
        if alive:
            return None
        self._ended()
        return self._process.returncode or 1, 0.0  # a worker that ends without an answer has failed

    def _ended(self) -> None:
        self.busy = False
        self.since = time.monotonic()

    def memory_gb(self) -> float:
        """Returns the peak memory of the process and its children in GB; 0 if unknown."""
        processes = [self._process.pid]
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children(recursive=True)
            processes += [child.pid for child in children]
        return sum(map(peak_bytes, processes)) / 1e9

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kills the process and its children; does nothing the second time."""
        if self._process.stdin is not None and self._process.stdin.closed:
            return
        self.signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
