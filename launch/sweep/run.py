"""One run of a sweep, as a job: trains or makes it, evaluates it, and records the outcome.

Steps done by an earlier start are not repeated. Example (the sweep starts these itself):

  python -m espalier.launch.sweep.run --out=runs/sweep --run=text/seed0
"""

if __name__ == "__main__":
    from espalier.launch.sweep import run

    raise SystemExit(run.main())

import contextlib
import importlib
import json
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from espalier.launch import cli
from espalier.launch.config import moved
from espalier.launch.config.setting_flags import Folder, Name
from espalier.launch.submit import worker
from espalier.launch.sweep import check, parts
from espalier.launch.sweep.file import Run
from espalier.launch.sweep.folder import Planned, SweepFolder, SweepFolderError
from espalier.launch.sweep.parts import command_line


def run_one(*, out: Folder, run: Name) -> Mapping[str, Any]:
    """Trains or makes a run and evaluates it; returns {'interrupted': True} if a signal stopped it.

    Args:
      out: folder of the sweep.
      run: name of the run in sweep.json.

    Raises:
      SweepFolderError: no such run, a run it depends on is not done, or its configuration has changed.
      MadeError: the command made nothing.
      EvaluationError: an evaluation failed, or its result cannot be written as JSON.
    """
    folder = SweepFolder(pathlib.Path(out))
    planned = {entry.name: entry for entry in folder.read_plan()}
    if run not in planned:
        raise SweepFolderError(f"{folder.path}/sweep.json has no run {run!r}.")
    entry = planned[run]
    if folder.changed(entry):
        raise SweepFolderError(f"{run} has begun with another configuration: use --rerun_changed.")
    record = {"digest": entry.digest, "evaluations": {}, **folder.record(run)}
    folder.write_record(run, record)
    if "trained" not in record:
        record["trained"] = (_make if entry.run.made else _train)(folder, entry, planned)
        if record["trained"] is None:
            return {"interrupted": True}
        folder.write_record(run, record)
    for key, settings in entry.run.evaluations.items():
        if key not in record["evaluations"]:
            print(f"\n== evaluation {key} ==", flush=True)
            began = time.monotonic()
            with _own_registries():
                result = evaluate(key, settings, folder.model_dir(entry.run))
            record["evaluations"][key] = {
                "digest": entry.evaluation_digests[key],
                "seconds": round(time.monotonic() - began, 1),
                "result": result,
            }
            folder.write_record(run, record)
    return {}


main = cli.command(__doc__, "sweep.run", run_one)


class MadeError(ValueError):
    """The command of a made run did not make it."""


def made_command(folder: SweepFolder, run: Run, plan: Mapping[str, Planned]) -> tuple[str, ...]:
    """Returns the words of the command that makes a run; `plan` has the runs that it is made of, by name."""
    places = {**folder.sources(run, plan), "run": str(folder.model_dir(run))}
    return parts.filled(run.made, {**places, "python": sys.executable})


def make(folder: SweepFolder, entry: Planned, plan: Mapping[str, Planned]) -> dict[str, Any]:
    """Makes a run by its command and returns its outcome; after a stop it starts from scratch.

    Raises:
      SweepFolderError: a run that it is made of is missing, or another process is making it.
      MadeError: the command made nothing.
      SystemExit: the command failed; its error is the last one in the log.
    """
    from espalier.trainers.checkpoints import step_dir

    for name in entry.run.above:
        folder.final_outcome(plan[name])
    target = folder.model_dir(entry.run)
    command = made_command(folder, entry.run, plan)
    with contextlib.closing(folder.lock_run(entry.name)):
        if target.is_file():  # from an earlier attempt
            target.unlink()
        shutil.rmtree(target, ignore_errors=True)
        print(command_line(command), flush=True)
        if (status := worker.run(command)) != 0:
            raise SystemExit(status)
    if not target.exists():
        raise MadeError(
            f"{entry.name}: its command succeeded without writing {target}: let it write to {{run}}."
        )
    # A run without a checkpoint, such as a file of embeddings, is an input of other commands.
    steps = step_dir.complete_steps(step_dir.absolute(target / step_dir.CHECKPOINTS))
    checkpoint = target / step_dir.CHECKPOINTS / steps[max(steps)].name if steps else None
    return {
        "step": max(steps, default=0),
        "checkpoint": str(checkpoint.relative_to(folder.path)) if checkpoint else None,
        "held_out": {},
        "tokens": 0,
        "loss_tokens": 0,
        "epochs": {},
    }


def _make(folder: SweepFolder, entry: Planned, plan: Mapping[str, Planned]) -> dict[str, Any]:
    """Makes the run by its command if its gin files are unchanged; returns its outcome."""
    if check.made_digest(entry.run, plan) != entry.digest:
        raise _changed(entry)
    with _own_registries():
        return make(folder, entry, plan)


def _train(
    folder: SweepFolder, entry: Planned, plan: Mapping[str, Planned]
) -> dict[str, Any] | None:
    """Trains as espalier train does; returns the outcome, or None if it was interrupted."""
    from espalier.launch.config import gin_config
    from espalier.launch.config import text as config_text

    parent = None if entry.run.parent is None else plan[entry.run.parent]
    start = None if parent is None else folder.final_checkpoint(parent)
    for name in entry.run.made_of.values():
        folder.final_outcome(plan[name])
    sources = folder.sources(entry.run, plan)
    with _own_registries():
        bindings = check.bindings_of(entry.run, folder, start, sources)
        config = gin_config.load(entry.run.gin_files, bindings, entry=check.ENTRY)
        canonical = config_text.canonical(config.text)
        if check.config_digest(canonical, entry.run, plan, sources) != entry.digest:
            raise _changed(entry)
        assert config.entry is not None
        if config.entry(started=time.monotonic())["interrupted"]:
            return None
        return _outcome(folder, entry, config.arguments()["stream"])


def _changed(entry: Planned) -> SweepFolderError:
    return SweepFolderError(
        f"{entry.name}: its gin files have changed since the sweep was started: start the sweep again."
    )


@contextlib.contextmanager
def _own_registries() -> Iterator[None]:
    """Clears the task registry at the end, so that the process's next run starts with an empty one."""
    from espalier.data import tasks

    try:
        yield
    finally:
        tasks.clear()


def _outcome(folder: SweepFolder, entry: Planned, stream: Callable[..., Any]) -> dict[str, Any]:
    """Returns the outcome of training, for the results."""
    from espalier.launch.run import metric_rows
    from espalier.trainers.checkpoints import step_dir

    directory = folder.directory(entry.name)
    checkpoint = pathlib.Path(step_dir.resolve(directory))
    step, meta = int(checkpoint.name), step_dir.read_meta(checkpoint)
    first_step = first_batch = 0
    if entry.start.get("initial_scope") == "state" and entry.run.parent is not None:
        parent = folder.record(entry.run.parent)["trained"]
        first_step = parent["step"]
        first_batch = step_dir.read_meta(folder.path / parent["checkpoint"])["data_step"]
    # With the run's own start: a run that continues its parent's data starts at the parent's position.
    positions = meta.get("initial", {}).get("positions")
    opened = stream(positions=positions) if positions else stream()
    before, after = opened.epochs(first_batch), opened.epochs(meta["data_step"])
    sources = opened.summary().get("sources", {})
    read = {name: after[name] - before[name] for name in after}
    rows = metric_rows.read_rows(directory)
    evaluated = any(key.startswith("eval/") for row in rows for key in row)
    return {
        "step": step,
        "checkpoint": str(checkpoint.relative_to(folder.path)),
        "held_out": metric_rows.last_evaluation(entry.name, rows)["domains"] if evaluated else {},
        "tokens": (step - first_step) * entry.tokens_per_step,
        "loss_tokens": round(
            sum(n * sources.get(name, {}).get("tokens", 0) for name, n in read.items())
        ),
        "epochs": {name: round(n, 6) for name, n in read.items()},
    }


class EvaluationError(ValueError):
    """An evaluation of a run failed."""


def evaluate(name: str, settings: Mapping[str, Any], directory: pathlib.Path) -> Any:
    """Returns the result of an evaluation of the run in a directory, as values that JSON can have.

    Args:
      name: name of the evaluation, for errors.
      settings: {'call': 'package.module:function', 'arguments': {...}}, called with the directory; or
        {'command': words}, in which {run}, {json} and {python} are replaced by the directory, the path of
        its JSON output, and this Python. A command of this project runs in this process.
      directory: directory of the run's config.gin and checkpoints.
    """
    if "call" in settings:
        module, _, function = settings["call"].partition(":")
        call: Callable[..., Any] = getattr(
            importlib.import_module(moved.name_of_today(module)), function
        )
        result = call(str(directory), **(settings.get("arguments") or {}))
        try:
            return json.loads(json.dumps(result))
        except (TypeError, ValueError) as error:
            raise EvaluationError(
                f"evaluation {name!r}: {settings['call']} returned a value that is not JSON: {error}."
            ) from None
    with tempfile.TemporaryDirectory() as temporary:
        file = pathlib.Path(temporary) / "result.json"
        places = {"run": str(directory), "json": str(file), "python": sys.executable}
        command = parts.filled(settings["command"], places)
        if (status := worker.run(command)) == cli.INTERRUPTED:  # what is trained is recorded
            raise SystemExit(status)
        if status != 0:
            raise EvaluationError(f"evaluation {name!r} ended with status {status}: {command}")
        try:
            return json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"evaluation {name!r} wrote no JSON to {file}: {error}."
            ) from None
