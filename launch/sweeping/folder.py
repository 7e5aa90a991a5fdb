"""A sweep's folder: the planned runs, their progress, and the results of finished runs.

sweep.json             the runs as planned, each with the digest of its configuration
results.jsonl          a row per finished run
runs/<run>/            a run's own directory (launch/run/run_dir.py), and in it
  sweep_run.json       the outcome: its digest, its last step, its evaluations
  attempts.jsonl       a row per ended attempt: seconds, exit status, peak memory, error
  log.txt              the output of all attempts
  made/                for a made run: the run directory itself
replaced/              runs with an old configuration, moved here by --rerun_changed
"""

import dataclasses
import fcntl
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from data.cache import cache_dir
from launch.sweeping.file import Run

# Bytes at the end of a file that contain its last rows.
_TAIL_BYTES = 16384


class SweepFolderError(ValueError):
    """A sweep's folder cannot be used for this operation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A run whose configuration has been checked.

    Attributes:
      run: the run in the sweep file.
      digest: SHA-256 of its configuration, or of the command that makes it, and of the digests of all runs it depends
        on.
      total_steps: step at which it ends; None if it depends on the data (TRAIN_TOKENS). A made run has neither steps
        nor tokens.
      first_step: step at which it starts: its parent's last step if it continues the parent's whole state, else 0.
      tokens_per_step: positions of a batch, including padding.
      start: the parts that it takes from its initial checkpoint: fields of `InitialCheckpoint`, each with the prefix
        `initial_`; empty for a run that starts with new parameters.
      evaluation_digests: SHA-256 of each evaluation's settings.
    """

    run: Run
    digest: str
    total_steps: int | None
    first_step: int | None
    tokens_per_step: int
    start: Mapping[str, Any]
    evaluation_digests: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.run.name


@dataclasses.dataclass(frozen=True)
class SweepFolder:
    """The paths and files of a sweep."""

    path: pathlib.Path

    def directory(self, name: str) -> pathlib.Path:
        """Returns a run's own directory, the MODEL_DIR of a trained run."""
        return self.path / "runs" / name

    def model_dir(self, run: Run) -> pathlib.Path:
        """Returns the directory of a run's config.gin and checkpoints/.

        For a made run it is a folder inside of its own directory, because its command needs a target that does not
        exist.
        """
        return self.directory(run.name) / "made" if run.made else self.directory(run.name)

    def sources(self, run: Run, plan: Mapping[str, "Planned"]) -> dict[str, str]:
        """Returns the directories of the runs that a run's command or bindings refer to, by arm."""
        return {arm: str(self.model_dir(plan[name].run)) for arm, name in run.made_of.items()}

    def final_checkpoint(self, planned: Planned) -> pathlib.Path:
        """Returns the step directory of a run's last step. With the run's directory, a damaged step would be skipped.

        Raises:
          SweepFolderError: the run is not done, or has no checkpoint.
        """
        outcome = self.final_outcome(planned)
        if outcome["checkpoint"] is None:
            raise SweepFolderError(
                f"{planned.name} is no parent: its command made no checkpoint in {self.model_dir(planned.run)}."
            )
        return self.path / outcome["checkpoint"]

    def final_outcome(self, planned: Planned) -> dict[str, Any]:
        """Returns the outcome of a run.

        Raises:
          SweepFolderError: the run is not done.
        """
        outcome = self.outcome(planned)
        if outcome is None:
            raise SweepFolderError(
                f"{planned.name} has not been trained yet: run the sweep, not a run."
            )
        return outcome

    def log(self, name: str) -> pathlib.Path:
        return self.directory(name) / "log.txt"

    @property
    def results(self) -> pathlib.Path:
        return self.path / "results.jsonl"

    def lock(self) -> IO[str]:
        """Locks the sweep, so that only this process drives it; closing the file releases the lock.

        Raises:
          SweepFolderError: another process drives the sweep.
        """
        return _lock(self.path, "runs this sweep. Stop it, or watch it with --status.")

    def lock_run(self, name: str) -> IO[str]:
        """Locks a run's directory, as training does, so that only this process works in it.

        Raises:
          SweepFolderError: another process works in it.
        """
        return _lock(
            self.directory(name), "makes this run. Stop it, or leave the run out (--only)."
        )

    def driven(self) -> bool:
        """Whether a process drives the sweep now."""
        return _held(self.path / ".lock")

    def in_use(self, name: str) -> bool:
        """Whether a process trains in a run's directory now, or makes the run."""
        return _held(self.directory(name) / ".lock")

    def in_use_for(self, name: str) -> float:
        """Returns the seconds since the process that works in a run's directory took the lock."""
        return time.time() - os.path.getmtime(self.directory(name) / ".lock")

    def write_plan(self, sweep: str, plan: Sequence[Planned]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        runs = [dataclasses.asdict(planned) for planned in plan]
        cache_dir.write_json(self.path / "sweep.json", {"sweep": sweep, "runs": runs})

    def read_plan(self) -> tuple[Planned, ...]:
        """Returns the runs of the last plan.

        Raises:
          SweepFolderError: no sweep has been started in this folder.
        """
        path = self.path / "sweep.json"
        if not path.exists():
            raise SweepFolderError(f"{path} does not exist: no sweep has been started in --out.")
        plan = []
        for entry in json.loads(path.read_bytes())["runs"]:
            run = entry.pop("run")
            for key in ("gin_files", "bindings", "made"):
                run[key] = tuple(run.get(key, ()))
            plan.append(Planned(run=Run(**run), **entry))
        return tuple(plan)

    def record(self, name: str) -> dict[str, Any]:
        """Returns the record of a run; empty if it has not begun."""
        path = self.directory(name) / "sweep_run.json"
        return json.loads(path.read_bytes()) if path.exists() else {}

    def write_record(self, name: str, record: Mapping[str, Any]) -> None:
        self.directory(name).mkdir(parents=True, exist_ok=True)
        cache_dir.write_json(self.directory(name) / "sweep_run.json", dict(record))

    def outcome(self, planned: Planned) -> dict[str, Any] | None:
        """Returns the outcome of training or making a run; None if it is not done, or its configuration has changed."""
        record = self.record(planned.name)
        return record.get("trained") if record.get("digest") == planned.digest else None

    def done(self, planned: Planned) -> bool:
        """Returns whether a run has been trained (or made) and evaluated with the planned settings."""
        evaluations = self.record(planned.name).get("evaluations", {})
        measured = {key: entry["digest"] for key, entry in evaluations.items()}
        return self.outcome(planned) is not None and all(
            measured.get(k) == v for k, v in planned.evaluation_digests.items()
        )

    def changed(self, planned: Planned) -> list[str]:
        """Returns the parts of a run whose configuration has changed: 'training', or names of evaluations."""
        record = self.record(planned.name)
        if record.get("digest", planned.digest) != planned.digest:
            return ["training"]
        measured = record.get("evaluations", {})
        return [
            name
            for name, digest in planned.evaluation_digests.items()
            if name in measured and measured[name]["digest"] != digest
        ]

    def set_aside(self, planned: Planned) -> None:
        """Moves a run with an old configuration to `replaced/`."""
        record = self.record(planned.name)
        changed = self.changed(planned)
        if changed != ["training"]:
            same = {k: v for k, v in record["evaluations"].items() if k not in changed}
            self.write_record(planned.name, {**record, "evaluations": same})
            return
        number = 1
        while (target := self.path / "replaced" / f"{planned.name}.{number}").exists():
            number += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        self.directory(planned.name).rename(target)

    def add_attempt(self, name: str, attempt: Mapping[str, Any]) -> None:
        with open(self.directory(name) / "attempts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(attempt) + "\n")

    def attempts(self, name: str) -> list[dict[str, Any]]:
        return list(rows_of(self.directory(name) / "attempts.jsonl"))

    def newest(self, name: str) -> dict[str, float]:
        """Returns the newest step and loss that a run has written; empty before the first."""
        path = self.directory(name) / "metrics.jsonl"
        newest: dict[str, float] = {}
        for line in tail(path).splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a partial line, at the cut or still being written
            if "loss" in row:
                newest = {"step": row["step"], "loss": number(row["loss"])}
        return newest


def tail(path: pathlib.Path, size: int = _TAIL_BYTES) -> str:
    """Returns the end of a text file; an empty text if there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - size, 0))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def rows_of(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSONL file, without an incomplete last line."""
    if path.exists():
        with open(path, encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def number(value: Any) -> Any:
    """Returns a number, also if JSON has it as a string (metric_writers.jsonable)."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _lock(directory: pathlib.Path, does: str) -> IO[str]:
    """Locks a directory for this process; the error names another process that holds the lock."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (stays open to hold the lock)
    if not _locked(lock):
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise SweepFolderError(f"{directory} is in use: {holder} {does}")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


def _locked(file: IO[str]) -> bool:
    """Takes the lock and returns whether that succeeded, or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _held(path: pathlib.Path) -> bool:
    """Whether another process holds a lock file."""
    if not path.exists():
        return False
    with open(path, "a+", encoding="utf-8") as file:
        return not _locked(file)
