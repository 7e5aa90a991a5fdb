"""Drives a sweep: submits unfinished runs, watches them, records outcomes, and stops at the time limit."""

import contextlib
import dataclasses
import datetime
import enum
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from espalier.launch.processes.supervisor import handled
from espalier.launch.submit.base import Handle, Job, State, Status, Submitter, first_error, tail
from espalier.launch.sweep.folder import Planned, SweepFolder, write_results

INTERRUPTED = 75
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 0.5
# Seconds for a stopped run to save. A run that takes longer is killed, and later resumes from its last checkpoint.
_GRACE_SECONDS = 120.0


class RunState(enum.Enum):
    """The state of a run of a sweep."""

    DONE = "done"
    RUNNING = "running"
    WAITING = "waiting"
    STOPPED = "stopped"  # has begun, and resumes where it stopped
    FAILED = "failed"
    BLOCKED = "blocked"  # a run that it depends on has failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run, for the screen.

    Attributes:
      planned: the run.
      state: see RunState.
      step, loss: newest step and loss in its metrics; before any row, its first step and None.
      seconds: seconds of all its attempts.
      rate: steps per second of the present attempt; None if unknown.
      error: first line of the error with which it failed.
    """

    planned: Planned
    state: RunState
    step: int
    loss: float | None = None
    seconds: float = 0.0
    rate: float | None = None
    error: str | None = None


Watcher = Callable[[Sequence[Progress]], Any]


# States of a run and of its job of which nothing has changed.
_UNCHANGED = ((RunState.DONE, State.ENDED), (RunState.WAITING, State.WAITING))


def progress(
    folder: SweepFolder,
    plan: Sequence[Planned],
    submitted: Mapping[str, Status] | None = None,
    known: Sequence[Progress] = (),
) -> list[Progress]:
    """Returns the progress of each run, read from its files.

    Args:
      folder: folder of the sweep.
      plan: the runs, each after the runs it depends on.
      submitted: status of submitted runs that have not ended, by name; None if another process drives the sweep, so
        that locks show which runs are training.
      known: an earlier result of the process that drives the sweep. Files of runs that were done then, or waited and still
        do, are not read again.
    """
    nothing = Status(state=State.ENDED)
    before = {entry.planned.name: entry for entry in known}
    out: dict[str, Progress] = {}
    for planned in plan:
        name = planned.name
        job = nothing if submitted is None else submitted.get(name, nothing)
        if name in before and (before[name].state, job.state) in _UNCHANGED:
            out[name] = before[name]
            continue
        attempts = folder.attempts(name)
        newest = folder.newest(name)
        above = {out[other].state for other in planned.run.above if other in out}
        if folder.done(planned):
            state = RunState.DONE
        elif job.state is State.RUNNING or (submitted is None and folder.in_use(name)):
            state = RunState.RUNNING
        elif job.state is State.WAITING:
            state = RunState.WAITING
        elif above & {RunState.FAILED, RunState.BLOCKED}:
            state = RunState.BLOCKED
        elif attempts and attempts[-1]["error"]:
            state = RunState.FAILED
        else:
            state = RunState.STOPPED if folder.record(name) else RunState.WAITING
        done_before = (attempts[-1]["step"] if attempts else planned.first_step) or 0
        num_steps = newest["step"] - done_before if newest else 0
        now = 0.0
        # The attempt of a run that has just ended is not recorded yet.
        if state is RunState.RUNNING or (state is RunState.DONE and job.state is State.RUNNING):
            now = job.seconds if submitted is not None else folder.in_use_for(name)
        out[name] = Progress(
            planned=planned,
            state=state,
            step=int(newest.get("step", planned.first_step or 0)),
            loss=newest.get("loss"),
            seconds=sum(attempt["seconds"] for attempt in attempts) + now,
            rate=num_steps / now if num_steps > 0 and now else None,
            error=attempts[-1]["error"] if state is RunState.FAILED else None,
        )
    return list(out.values())


def drive(
    folder: SweepFolder,
    plan: Sequence[Planned],
    submitter: Submitter,
    *,
    wanted: Sequence[str],
    command: Callable[[str], tuple[str, ...]],
    watch: Watcher,
    minutes: float | None = None,
) -> int:
    """Runs the wanted runs that are not done; returns the exit status.

    The status is 0 if all wanted runs are done, 75 if some were stopped (the next start resumes them), 1 if some failed. A
    failure stops only the runs that depend on the failed run; the next start retries it.

    Args:
      folder: folder of the sweep.
      plan: all runs, each after the runs it depends on.
      submitter: executes runs; closed at the end.
      wanted: names of the runs to finish.
      command: returns the words of the command for a run's name.
      watch: called with the progress of the wanted runs, about twice a second.
      minutes: time limit; then no run is started, and running runs are stopped.
    """
    began = time.monotonic()
    chosen = [planned for planned in plan if planned.name in set(wanted)]
    open_jobs = submit(folder, plan, submitter, wanted, command)
    for name in open_jobs:
        folder.directory(name).mkdir(parents=True, exist_ok=True)
    stopping, closed = 0.0, 0.0  # when jobs were told to stop, and were last ended
    heard = 1  # signals that have been acted on
    known: list[Progress] = []
    write_results(folder, plan)
    try:
        with stop_signals() as signals:
            while open_jobs:
                statuses = submitter.statuses(list(open_jobs.values()))
                for name, handle in list(open_jobs.items()):
                    status = statuses[handle]
                    if status.state in (State.ENDED, State.DROPPED):
                        del open_jobs[name]
                    if status.state is State.ENDED:
                        # A signal may reach a run before it can save, for example during its start.
                        killed = not 0 <= (status.exit_status or 0) <= 128
                        _record(folder, plan, name, status, bool(closed or (stopping and killed)))
                submitted = {name: statuses[handle] for name, handle in open_jobs.items()}
                known = progress(folder, chosen, submitted, known)
                watch(known)
                now = time.monotonic()
                due = minutes is not None and now - began > 60 * minutes
                if not stopping and (signals or due):
                    stopping = now
                    for handle in open_jobs.values():
                        submitter.cancel(handle)
                elif stopping and (
                    len(signals) > heard or now - (closed or stopping) > _GRACE_SECONDS
                ):
                    # Again at a further signal or after as long: a scheduler may have given no answer.
                    closed, heard = now, max(len(signals), 1)
                    submitter.close()
                elif open_jobs:
                    time.sleep(_POLL_SECONDS)
    finally:
        submitter.close()
    last = progress(folder, chosen, {})
    watch(last)
    states = {entry.state for entry in last}
    if states & {RunState.STOPPED, RunState.WAITING}:
        return INTERRUPTED
    return 1 if states & {RunState.FAILED, RunState.BLOCKED} else 0


def submit(
    folder: SweepFolder,
    plan: Sequence[Planned],
    submitter: Submitter,
    wanted: Sequence[str],
    command: Callable[[str], tuple[str, ...]],
) -> dict[str, Handle]:
    """Submits the wanted runs that are not done, each after the runs it depends on; returns handles by name."""
    jobs: dict[str, Handle] = {}
    for planned in plan:
        name, run = planned.name, planned.run
        if name not in wanted or folder.done(planned):
            continue
        peaks = [attempt["memory_gb"] for attempt in folder.attempts(name)]
        jobs[name] = submitter.submit(
            Job(
                name=name,
                command=command(name),
                log=str(folder.log(name)),
                memory_gb=max(filter(None, peaks), default=run.memory_gb),
                kind=run.kind,
                after=tuple(jobs[above] for above in run.above if above in jobs),
            )
        )
    return jobs


def _record(
    folder: SweepFolder, plan: Sequence[Planned], name: str, status: Status, stopped: bool
) -> None:
    """Records the end of an attempt; one that was `stopped` has no error."""
    planned = next(entry for entry in plan if entry.name == name)
    error = None
    if not folder.done(planned) and status.exit_status != INTERRUPTED:
        error = None if stopped else first_error(folder.log(name), status.exit_status or 0)
    folder.add_attempt(
        name,
        {
            "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(status.seconds, 1),
            "status": status.exit_status,
            "step": int(folder.newest(name).get("step", planned.first_step or 0)),
            "memory_gb": None if status.memory_gb is None else round(status.memory_gb, 3),
            "error": error,
            "tail": tail(folder.log(name), 2000).splitlines()[-20:] if error else None,
        },
    )
    if folder.done(planned):
        write_results(folder, plan)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields the list of received SIGINT and SIGTERM; the first stops runs, the second kills them."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        how = "a second one ends them at once" if len(received) == 1 else "ending them"
        print(f"\n{signal.Signals(number).name}: runs save and stop; {how}.", file=sys.stderr)

    with handled(_SIGNALS, handle):
        yield received
