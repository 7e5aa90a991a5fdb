"""Runs jobs on a SLURM cluster, by scripts that `sbatch` reads; nothing is pickled.

A job leaves two files beside its log: LOG.job with its id, command and settings, and LOG.ended with its exit status. So a driver that is
started again takes over jobs that are still queued, without the accounting database.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.launch import environment
from espalier.launch.submit import slurm_script
from espalier.launch.submit.base import Handle, Job, State, Status, SubmitError, answer

_WAITING = (
    *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"),
    *("SPECIAL_EXIT", "SIGNALING", "PREEMPTED"),
)
_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESIZING")
# Settings that may differ between a job that is queued and the driver that takes it over.
_OF_THE_DRIVER = {"at_once", "poll_seconds"}
# Seconds until the status file of a job that has ended must be visible on a network file system.
_VISIBLE_SECONDS = 30.0
# Jobs of an array: a cluster's MaxArraySize is 1001 unless it says otherwise.
_ARRAY = 1000
# Seconds for which the scheduler may give no answer, for example during its own restart.
_SILENT_SECONDS = 900.0


@dataclasses.dataclass
class _Entry:
    """A job with its id in SLURM; None before it is sent."""

    job: Job
    id: str | None = None
    dropped: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(slurm_script.Settings):
    """The settings of slurm_script.py, which knows no queue."""

    def submitter(self) -> "SlurmSubmitter":
        return SlurmSubmitter(self)


class SlurmSubmitter:
    """A queue of SLURM; see launch.submit.base.Queue. Jobs without an order among them are sent as one array."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._entries: dict[Handle, _Entry] = {}
        self._known: dict[str, tuple[str, float, str]] = {}  # state, seconds, reason by id
        self._gone: dict[str, float] = {}  # when a job without a status file was first missing
        self._asked = -1e9
        self._answered = time.monotonic()

    def handle(self, job: Job) -> Handle:
        return os.path.abspath(job.log)

    def submit(self, job: Job) -> Handle:
        handle = self.handle(job)
        self._entries[handle] = _Entry(job)
        return handle

    def preview(self) -> str:
        names = {handle: entry.job.name for handle, entry in self._entries.items()}
        texts = []
        for jobs in self._arrays(list(self._entries)):
            after = [names[handle] for handle in jobs[0].after]
            note = f"# sbatch --dependency=afterok:(ids of {', '.join(after)})\n" if after else ""
            texts.append(note + slurm_script.render(self._settings, jobs))
        return "\n".join(texts)

    def statuses(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        self._adopt(handles)
        self._send()
        self._ask()
        return {handle: self._status(handle) for handle in handles}

    def cancel(self, handle: Handle) -> None:
        self._adopt([handle])
        entry = self._entries[handle]
        if entry.id is None:
            entry.dropped = True
            return
        self._asked = -1e9
        _mark_cancelled(handle, entry.id)
        self._ask()
        if self._known.get(entry.id, ("", 0, ""))[0] in _RUNNING:
            _slurm("scancel", "--signal=TERM", entry.id)
        else:
            _slurm("scancel", entry.id)
        self._asked = -1e9

    def close(self) -> None:
        ids = {entry.id: handle for handle, entry in self._entries.items() if entry.id is not None}
        with contextlib.suppress(SubmitError):  # just ended, or the scheduler gives no answer
            known = self._query(list(ids)) if ids else {}
            alive = [job for job in ids if known.get(job, ("",))[0] in _WAITING + _RUNNING]
            for job in alive:
                _mark_cancelled(ids[job], job)
            if alive:
                _slurm("scancel", *alive)

    def _adopt(self, handles: Sequence[Handle]) -> None:
        """Takes over jobs that another process submitted and that have not ended."""
        recorded = {}
        for handle in handles:
            entry = self._entries.get(handle)
            if entry is not None and (entry.id is not None or entry.dropped):
                continue
            record = _read(f"{handle}.job")
            if "id" in record:
                recorded[handle] = record
            elif entry is None:
                raise SubmitError(f"no job was submitted with the log {handle}.")
        alive = self._query([record["id"] for record in recorded.values()]) if recorded else {}
        for handle, record in recorded.items():
            entry = self._entries.get(handle)
            if entry is None:
                job = Job(name=record["name"], command=tuple(record["command"]), log=handle)
                self._entries[handle] = _Entry(job, record["id"])
            elif alive.get(record["id"], ("",))[0] in _WAITING + _RUNNING:
                other = set(self._settings.changed(record.get("settings", {}))) - _OF_THE_DRIVER
                if list(entry.job.command) != record["command"]:
                    other.add("command")
                if other:
                    raise SubmitError(
                        f"{handle}: job {record['id']} is still queued or running with another {', '.join(sorted(other))}: "
                        f"cancel it first (--cancel, or scancel {record['id']})."
                    )
                entry.id = record["id"]

    def _arrays(self, handles: Sequence[Handle]) -> list[list[Job]]:
        """Returns unsent jobs in groups with the same jobs before them, in an order in which they can be sent."""
        groups: dict[tuple[Handle, ...], list[Job]] = {}
        for handle in handles:
            job = self._entries[handle].job
            groups.setdefault(job.after, []).append(job)
        return [
            jobs[i : i + _ARRAY] for jobs in groups.values() for i in range(0, len(jobs), _ARRAY)
        ]

    def _send(self) -> None:
        """Sends all jobs that have no id yet."""
        new = [h for h, entry in self._entries.items() if entry.id is None and not entry.dropped]
        for jobs in self._arrays(new):
            before = [self._entries[handle] for handle in jobs[0].after]
            if any(entry.dropped for entry in before):
                for job in jobs:
                    self._entries[self.handle(job)].dropped = True
                continue
            needed = [entry.id for entry in before if not self._succeeded(entry)]
            words = ["sbatch", "--parsable"]
            if needed:
                words += [
                    f"--dependency=afterok:{':'.join(map(str, needed))}",
                    "--kill-on-invalid-dep=yes",
                ]
            for job in jobs:
                _prepare(self.handle(job))
            sent = _slurm(*words, script=slurm_script.render(self._settings, jobs))
            number = sent.strip().partition(";")[0]  # the cluster's name may follow
            for index, job in enumerate(jobs):
                handle = self.handle(job)
                identity = number if len(jobs) == 1 else f"{number}_{index}"
                self._entries[handle].id = identity
                record = {
                    "id": identity,
                    "name": job.name,
                    "command": list(job.command),
                    "settings": dataclasses.asdict(self._settings),
                }
                pathlib.Path(f"{handle}.job").write_text(json.dumps(record), encoding="utf-8")
            self._asked = -1e9

    def _succeeded(self, entry: _Entry) -> bool:
        """Whether a job has ended well; SLURM forgets such jobs, and then refuses to wait for them."""
        ended = _read(f"{self.handle(entry.job)}.ended")
        return ended.get("id") == entry.id and ended.get("status") == 0

    def _ask(self) -> None:
        now = time.monotonic()
        ids = [entry.id for entry in self._entries.values() if entry.id is not None]
        if not ids or now - self._asked < self._settings.poll_seconds:
            return
        try:
            self._asked = now
            self._known = self._query(ids)
        except SubmitError:
            # Jobs go on while the scheduler does not answer, and so do those who wait for them.
            if now - self._answered > _SILENT_SECONDS:
                raise
        else:
            self._answered = now

    def _query(self, ids: Sequence[str | None]) -> dict[str, tuple[str, float, str]]:
        """Returns state, seconds and reason of the jobs that SLURM knows, by id."""
        numbers = sorted({str(job).partition("_")[0] for job in ids})
        words = ("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%M|%r")
        try:
            lines = _slurm(*words, f"--jobs={','.join(numbers)}").splitlines()
        except SubmitError as error:
            if "Invalid job id" in str(error):  # of a single job that SLURM has forgotten
                return {}
            raise
        known = {}
        for line in lines:
            identity, state, duration, reason = line.strip().split("|", 3)
            known[identity] = (state, _seconds(duration), reason)
        return known

    def _status(self, handle: Handle) -> Status:
        entry = self._entries[handle]
        if entry.id is None:
            return Status(state=State.DROPPED if entry.dropped else State.WAITING)
        ended = _read(f"{handle}.ended")
        if ended.get("id") == entry.id:
            return Status(
                state=State.ENDED, exit_status=int(ended["status"]), seconds=float(ended["seconds"])
            )
        state, seconds, reason = self._known.get(entry.id, ("unknown", 0.0, ""))
        if state == "PENDING" and reason == "DependencyNeverSatisfied":
            _slurm("scancel", entry.id)
            return Status(state=State.DROPPED)
        if state in _WAITING:
            self._gone.pop(handle, None)
            return Status(state=State.WAITING)
        if state in _RUNNING:
            self._gone.pop(handle, None)
            with contextlib.suppress(OSError, ValueError):  # of earlier starts
                seconds += float(pathlib.Path(f"{handle}.seconds").read_text(encoding="utf-8"))
            return Status(state=State.RUNNING, seconds=seconds)
        if state == "CANCELLED" and not seconds:
            return Status(state=State.DROPPED)
        now = time.monotonic()
        if now - self._gone.setdefault(handle, now) < _VISIBLE_SECONDS:
            return Status(state=State.RUNNING, seconds=seconds)
        self._explain(handle, entry.id, state)
        return Status(state=State.ENDED, exit_status=1, seconds=seconds)

    def _explain(self, handle: Handle, identity: str, state: str) -> None:
        """Writes the scheduler's word on a job that left no status into its log, once."""
        reason = f"SLURM job {identity} ended without a status: {state}."
        if not _read(f"{handle}.ended"):
            with open(handle, "a", encoding="utf-8") as log:
                print(f"error: {reason}", file=log)
            with open(f"{handle}.ended", "w", encoding="utf-8") as file:
                json.dump({"id": identity, "status": 1, "seconds": 0}, file)


def _prepare(log: str) -> None:
    """Makes a log's folder, and removes what an earlier job left beside the log."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    for suffix in ("ended", "cancelled", "job", "seconds"):
        pathlib.Path(f"{log}.{suffix}").unlink(missing_ok=True)


def _mark_cancelled(log: str, identity: str) -> None:
    """Writes the file that the job's script reads, which would otherwise queue the job again."""
    pathlib.Path(f"{log}.cancelled").write_text(identity)


def _read(path: str) -> dict[str, Any]:
    """Returns the content of a small JSON file; empty if it is missing or being written."""
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        content = json.load(file)
        return content if isinstance(content, dict) else {}
    return {}


def _seconds(duration: str) -> float:
    """Returns the seconds of SLURM's [days-][hours:]minutes:seconds."""
    days, _, clock = duration.rpartition("-")
    total = 0.0
    with contextlib.suppress(ValueError):  # 'INVALID' for a job that has not started
        for part in clock.split(":"):
            total = 60 * total + float(part)
        return total + 86400 * float(days or 0)
    return 0.0


def _slurm(*words: str, script: str = "") -> str:
    """Runs a command of SLURM and returns its output; raises SubmitError with the scheduler's own words."""
    missing = "submit from a host of the SLURM cluster, or see the script with --dry_run"
    env = environment.of_user()  # which sbatch passes on to the job
    return answer(
        words, missing=missing, refused=f"SLURM refused ({words[0]})", text=script, env=env
    )
