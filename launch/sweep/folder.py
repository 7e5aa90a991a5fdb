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

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from espalier.common import files
from espalier.launch.inference import row_files
from espalier.launch.submit.base import tail
from espalier.launch.sweep.file import Run
from espalier.trainers.telemetry.metric_writers import jsonable, read_jsonl, restored


class SweepFolderError(ValueError):
    """A sweep's folder cannot be used for this operation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A run whose configuration has been checked.

    Attributes:
      run: the run in the sweep file.
      digest: SHA-256 of its configuration or command, and of the digests of all runs it depends on.
      evaluation_digests: SHA-256 of each evaluation's settings.
      total_steps: step at which it ends; None if it depends on the data (TRAIN_TOKENS). A made run has no steps.
      first_step: step at which it starts: its parent's last step if it continues the parent's whole state, else 0.
      tokens_per_step: positions of a batch, including padding.
      start: fields of its `InitialCheckpoint`, each with the prefix `initial_`; empty if it starts with new parameters.
    """

    run: Run
    digest: str
    evaluation_digests: Mapping[str, str]
    total_steps: int | None = 0
    first_step: int | None = 0
    tokens_per_step: int = 0
    start: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
        """Returns the directory of a run's config.gin and checkpoints/; for a made run a subfolder, made by its command."""
        return self.directory(run.name) / "made" if run.made else self.directory(run.name)

    def sources(self, run: Run, plan: Mapping[str, "Planned"]) -> dict[str, str]:
        """Returns the directories of the runs that a run's command or bindings refer to, by arm."""
        return {arm: str(self.model_dir(plan[name].run)) for arm, name in run.made_of.items()}

    def final_checkpoint(self, planned: Planned) -> pathlib.Path:
        """Returns the step directory of a run's last step; restoring the run directory could skip a damaged step.

        Raises:
          SweepFolderError: the run is not done, or has no checkpoint.
        """
        outcome = self.final_outcome(planned)
        if outcome["checkpoint"] is None:
            raise SweepFolderError(
                f"{planned.name} cannot be a parent: its command wrote no checkpoint in "
                f"{self.model_dir(planned.run)}."
            )
        return self.path / outcome["checkpoint"]

    def final_outcome(self, planned: Planned) -> dict[str, Any]:
        """Returns the outcome of a run; raises SweepFolderError if it is not done."""
        if (outcome := self.outcome(planned)) is None:
            raise SweepFolderError(f"{planned.name} is not trained yet; run the whole sweep.")
        return outcome

    def log(self, name: str) -> pathlib.Path:
        return self.directory(name) / "log.txt"

    @property
    def results(self) -> pathlib.Path:
        return self.path / "results.jsonl"

    def lock(self) -> IO[str]:
        """Locks the sweep for this process until the file is closed; raises SweepFolderError if another has it."""
        return _lock(self.path, "runs this sweep. Stop it, or watch it with --status.")

    def lock_run(self, name: str) -> IO[str]:
        """Locks a run's directory, as training does; raises SweepFolderError if another process works in it."""
        return _lock(self.directory(name), "makes this run. Stop it, or exclude the run (--only).")

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
        plan_json = {"sweep": sweep, "runs": runs}
        # Synced, because the sweep goes on by its plan.
        files.write_json(self.path / "sweep.json", plan_json, synced=True, shared=True)

    def read_plan(self) -> tuple[Planned, ...]:
        """Returns the runs of the last plan; raises SweepFolderError if no sweep was started here."""
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
        path = self.directory(name) / "sweep_run.json"
        # Synced: a run without its record would be trained again.
        files.write_json(path, dict(record), synced=True, shared=True)

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
        path = self.directory(name) / "attempts.jsonl"
        files.append(path, json.dumps(attempt) + "\n", synced=False)  # only reported

    def attempts(self, name: str) -> list[dict[str, Any]]:
        path = self.directory(name) / "attempts.jsonl"
        return read_jsonl(str(path)) if path.exists() else []

    def newest(self, name: str) -> dict[str, float]:
        """Returns the newest step and loss that a run has written; empty before the first."""
        for line in reversed(tail(self.directory(name) / "metrics.jsonl").splitlines()):
            # A partial line, at the cut or still being written, or a damaged one.
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if "loss" in (row := json.loads(line)):
                    return {"step": row["step"], "loss": restored(row["loss"])}
        return {}


def _lock(directory: pathlib.Path, use: str) -> IO[str]:
    """Locks a directory for this process; the error names another process that holds the lock."""
    try:
        return files.lock_folder(directory)
    except BlockingIOError as error:
        raise SweepFolderError(f"{directory} is in use: {error} {use}") from None


def _held(path: pathlib.Path) -> bool:
    """Whether another process holds a lock file."""
    if path.exists():
        with open(path, "ab") as file:  # NFS locks need write access
            try:
                files.lock(file)
            except BlockingIOError:
                return True
            except OSError:  # a file system without locks
                pass
    return False


def write_results(folder: SweepFolder, plan: Sequence[Planned]) -> None:
    """Rewrites the file atomically with one row for each finished run.

    A run whose parent is being repeated has no row until the parent is done.
    """
    rows = [result_row(folder, planned, plan) for planned in plan if folder.done(planned)]
    row_files.write(str(folder.results), map(jsonable, filter(None, rows)))


def read_results(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a sweep's results.jsonl, in the order of the sweep.

    Args:
      path: the sweep's folder (--out), or the file.

    Raises:
      FileNotFoundError: there is no results.jsonl.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        file = file / "results.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: give the folder (--out) of a sweep.")
    return read_jsonl(str(file))


def result_row(folder: SweepFolder, planned: Planned, plan: Sequence[Planned]) -> dict[str, Any]:
    """Returns the row of a finished run in results.jsonl; empty if a run that it descends from is missing.

    `tokens` (positions of its batches), `loss_tokens` (without padding) and `epochs` (of each
    source) are those of this run alone, and 0 if it is `made`. With the suffix `_total`
    they include all `parents`, the runs that it descends from, nearest first: for a mixture, the seed and all branches,
    each counted once. `made_of` has the runs in a made run's command. `held_out` has the last evaluation's metrics by
    task.
    """
    by_name = {other.name: other for other in plan}
    line = [planned.name]
    for name in line:  # the loop appends to `line`
        line += [above for above in by_name[name].run.above if above not in line]
    outcomes = [one for name in line if (one := folder.outcome(by_name[name])) is not None]
    if len(outcomes) < len(line):
        return {}
    record = folder.record(planned.name)
    attempts = folder.attempts(planned.name)
    peaks = [attempt["memory_gb"] for attempt in attempts if attempt["memory_gb"]]
    epochs_total: dict[str, float] = {}
    for outcome in outcomes:
        for source, count in outcome["epochs"].items():
            epochs_total[source] = round(epochs_total.get(source, 0.0) + count, 6)
    return {
        "run": planned.name,
        "arm": planned.run.arm,
        "size": planned.run.size,
        "seed": planned.run.seed,
        "parents": line[1:],
        "made": bool(planned.run.made),
        "made_of": list(planned.run.made_of.values()) if planned.run.made else [],
        "directory": str(folder.model_dir(planned.run).relative_to(folder.path)),
        **outcomes[0],
        "start": dict(planned.start),
        "tokens_total": sum(outcome["tokens"] for outcome in outcomes),
        "epochs_total": epochs_total,
        "evaluations": {name: e["result"] for name, e in record["evaluations"].items()},
        "seconds": round(sum(attempt["seconds"] for attempt in attempts), 1),
        "memory_gb": max(peaks, default=None),
        "attempts": len(attempts),
        "digest": planned.digest,
    }
