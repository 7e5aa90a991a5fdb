"""The sweeps of a reproduction: runs their unfinished runs, and reads the results."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from espalier.common import files

if TYPE_CHECKING:
    from launch.sweeping.file import Run

_PAPERS = pathlib.Path(__file__).parents[1]


class StoppedError(Exception):
    """A sweep was stopped and continues when it is started again."""


def parts(
    model_dir: str,
    sweeps: Mapping[str, tuple[str, int | str]],
    read: Callable[[Mapping[str, Any], pathlib.Path], dict[str, Any]],
    **options: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Returns the results of a paper's sweeps by part, after their unfinished runs; options as of `rows`.

    Args:
      model_dir: parent of the sweeps' folders, which have the parts' names.
      sweeps: part -> (name, argument) of its sweep, as of `rows`.
      read: (row of results, directory of its run) -> the completed row.
    """
    out = {}
    for part, (name, argument) in sweeps.items():
        folder = pathlib.Path(model_dir, part)
        every = rows(folder, name, argument, **options)
        out[part] = [read(row, folder / row["directory"]) for row in every]
    return out


def rows(
    folder: pathlib.Path,
    name: str,
    argument: int | str,
    *,
    workers: int = 1,
    minutes: float | None = None,
) -> list[dict[str, Any]]:
    """Returns the results of a sweep, after its unfinished runs.

    Args:
      folder: of the sweep.
      name: of its file, as PAPER/FILE without .py.
      argument: of the file's `get_config`: the number of seeds, or a text with more.
      workers: runs at once.
      minutes: after which it stops; the same call continues.

    Raises:
      ValueError: the sweep could not be run.
      StoppedError: it was stopped, by a signal or the time.
    """
    from launch import cli, sweep

    file = _file(name, argument)
    words = [f"--sweep={file}", f"--out={folder}", f"--workers={workers}"]
    status = sweep.main([*words, *([] if minutes is None else [f"--minutes={minutes}"])])
    if status == cli.INTERRUPTED:
        raise StoppedError(f"The sweep in {folder} was stopped; the same command continues it.")
    if status == 2:
        raise ValueError(f"The sweep {file} was not run; see above.")
    # With status 1 some runs have failed; the report names them.
    return sweep.read_results(folder)


def planned(name: str, argument: int | str) -> "tuple[Run, ...]":
    """Returns all runs of a sweep, done or not."""
    from launch.sweeping import file

    return file.read(_file(name, argument))


def _file(name: str, argument: int | str) -> str:
    return f"{_PAPERS / name}.py:{argument}"


def metrics(directory: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl; none where the run was not trained."""
    from trainers.telemetry.metric_writers import rows_in_force

    path = directory / "metrics.jsonl"
    return list(rows_in_force(str(path))) if path.exists() else []


@dataclasses.dataclass(frozen=True)
class Stages:
    """Measurements beside the sweeps, a JSON file of `folder` each; one with the same settings is not repeated."""

    folder: pathlib.Path

    def get(
        self, name: str, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Returns {settings, seconds, result}: read if the settings are the same, else measured and written."""
        path = self.folder / f"{name}.json"
        wanted = json.loads(json.dumps(settings))
        if path.exists():
            stage = json.loads(path.read_bytes())
            if stage["settings"] == wanted:
                print(f"{name}: already measured ({path})", flush=True)
                return stage
        print(f"{name}: measuring", flush=True)
        began = time.monotonic()
        result = measure()
        seconds = round(time.monotonic() - began, 1)
        stage = {"settings": wanted, "seconds": seconds, "result": json.loads(json.dumps(result))}
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, stage, synced=True)  # it took long
        return stage
