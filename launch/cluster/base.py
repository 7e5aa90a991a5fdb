"""Jobs and what runs them: all that a driver of many runs sees of the place where they run.

A job is plain data, so that any back end can take it: processes of this machine
(launch/cluster/local.py), or a cluster's queue. A back end gets all jobs at once, each with those that
must end well before it, and decides itself when there is room for the next.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Protocol

Handle = str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A command to be run.

    Attributes:
      name: for people.
      command: its words; run in the directory in which it was submitted.
      log: file to which its output is appended.
      environment: variables beside those of the submitting process.
      memory_gb: the most memory it needs, in GB (1e9 bytes); None if that is not known.
      kind: jobs of one kind are taken to need as much memory as those of it that have ended.
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
    """Where a job stands."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"
    # Never started: it was cancelled before, or a job that it comes after did not end with status 0.
    DROPPED = "dropped"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """What is known of a job.

    Attributes:
      state: see State.
      exit_status: of a job that has ended; negative for the signal that ended it.
      seconds: it has run so far.
      memory_gb: its peak; None where that is not known.
    """

    state: State
    exit_status: int | None = None
    seconds: float = 0.0
    memory_gb: float | None = None


class Submitter(Protocol):
    """A back end."""

    def submit(self, job: Job) -> Handle:
        """Takes a job; returns at once."""
        ...

    def statuses(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        """How these jobs stand; asked about once a second."""
        ...

    def cancel(self, handle: Handle) -> None:
        """Drops a job that waits; asks one that runs (SIGTERM) to save its work and end."""
        ...

    def close(self) -> None:
        """Ends all that is left, at once."""
        ...
