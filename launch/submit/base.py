"""The interface between a driver of many runs, or `espalier submit`, and a back end that executes them.

A job is plain data, so that any back end can run it: processes of this machine (launch/submit/local.py), or a
cluster's queue. A back end receives all jobs at once, each with the jobs that must succeed before it, and decides
itself when to start the next.
"""

import dataclasses
import enum
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

Handle = str
ADDRESS = "give an address such as gs://BUCKET/PATH (docs/scale/remote_storage.md says for what)"
_ANSWER_SECONDS = 120.0
# Bytes at the end of a file that contain its last rows.
_TAIL_BYTES = 16384


class SubmitError(ValueError):
    """A job cannot be submitted, or a launch configuration is wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A command to run.

    Attributes:
      command: program and arguments; run in the working directory of the submitting process.
      log: file to which the output is appended.
      environment: variables in addition to those of the submitting process.
      memory_gb: peak memory, in GB (1e9 bytes); None if unknown.
      kind: the memory need of a job is estimated from finished jobs of the same kind.
      after: jobs that must have ended with status 0 before this one starts.
    """

    name: str
    command: tuple[str, ...]
    log: str
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    memory_gb: float | None = None
    kind: str = ""
    after: tuple[Handle, ...] = ()


class State(enum.Enum):
    """State of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"
    # Never started: it was cancelled, or a job in its `after` did not end with status 0.
    DROPPED = "dropped"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """State and resource use of a job.

    Attributes:
      state: see State.
      exit_status: exit status of a job that has ended; minus the signal's number if a signal ended it.
      seconds: run time so far.
      memory_gb: peak memory so far, in GB; None if unknown.
    """

    state: State
    exit_status: int | None = None
    seconds: float = 0.0
    memory_gb: float | None = None


class Submitter(Protocol):
    """A back end that runs jobs."""

    def submit(self, job: Job) -> Handle:
        """Queues a job and returns its handle at once."""
        ...

    def statuses(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        """Returns the status of each job; drivers call this about once a second."""
        ...

    def cancel(self, handle: Handle) -> None:
        """Drops a waiting job; sends SIGTERM to a running one, so that it saves its work and ends."""
        ...

    def close(self) -> None:
        """Ends all jobs at once."""
        ...

    def preview(self) -> str:
        """Returns the scripts, manifests or commands of the submitted jobs, and sends nothing."""
        ...


class Queue(Submitter, Protocol):
    """A back end whose jobs outlive the process that submits them.

    Submitting sends nothing: the first call of `statuses` sends all jobs. A job that another process submitted
    and that has not ended is taken over instead of being sent again.
    """

    def handle(self, job: Job) -> Handle:
        """Returns the handle that `submit` returns, without submitting, for the status of a job or to cancel it."""
        ...


def name_of(job: Job) -> str:
    """Returns a name that Kubernetes takes: readable, and of this command only."""
    digest = hashlib.sha256(json.dumps([job.name, job.log, *job.command]).encode()).hexdigest()[:6]
    words = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")[:32].strip("-")
    readable = words if words[:1].isalpha() else f"run-{words}".strip("-")
    return f"{readable}-{digest}"


def numbered(steps: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Returns the commands of each step, below its number and text as a comment."""
    return ["\n".join([f"# {i}. {text}", *lines, ""]) for i, (text, lines) in enumerate(steps, 1)]


def tail(path: pathlib.Path, size: int = _TAIL_BYTES) -> str:
    """Returns the end of a text file; an empty text if there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - size, 0))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def first_error(log: pathlib.Path, status: int) -> str:
    """Returns one line on the reason of a job's failure: its error message, else the last line of its traceback."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    lines = [line.strip() for line in re.split(r"[\r\n]+", tail(log)) if line.strip()]
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    return (raised or lines or [f"ended with status {status}"])[-1]


class Printed:
    """A back end that only shows what a person sends, because it costs money from then on; see `Queue`.

    Args:
      text: returns the commands or the manifests of a job.
      what: what they are, for the message.
    """

    def __init__(self, text: Callable[[Job], str], what: str):
        self._text, self._what = text, what
        self._jobs: list[Job] = []

    def handle(self, job: Job) -> Handle:
        return name_of(job)

    def submit(self, job: Job) -> Handle:
        self._jobs.append(job)
        return self.handle(job)

    def preview(self) -> str:
        return "\n".join(map(self._text, self._jobs))

    def statuses(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        raise SubmitError(f"{self._what} are for a person: see them with --dry_run, and send them.")

    def cancel(self, handle: Handle) -> None:
        self.statuses([handle])

    def close(self) -> None:
        self._jobs = []


def answer(
    words: Sequence[str],
    *,
    missing: str,
    refused: str,
    text: str | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Runs a program of a cluster and returns its output.

    Args:
      words: the program and its arguments.
      missing: what to do where there is no such program.
      refused: who refuses, for the message with the program's own words.
      text: its input; None for this process's.
      env: its environment; None for this process's.

    Raises:
      SubmitError: the program is missing, gives no answer, or refuses.
    """
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=_ANSWER_SECONDS, env=env
        )
    except FileNotFoundError:
        raise SubmitError(f"there is no {words[0]} here: {missing}.") from None
    except subprocess.TimeoutExpired:
        raise SubmitError(f"{words[0]} gave no answer within {_ANSWER_SECONDS:.0f} s.") from None
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
        raise SubmitError(f"{refused}: {reason}")
    return done.stdout
