"""What reports read of a run: its name by its directory, the rows of metrics.jsonl, and its objective by its config.gin."""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.common.storage import mirror, paths
from espalier.trainers.telemetry.metric_writers import DamagedRowsError, rows_in_force

_LOSSES = "LOSSES"  # the macro with the losses of a preference run
_HELD_OUT = "eval/"  # begins the names of held-out metrics, eval/SOURCE/METRIC


class NotEvaluatedError(ValueError):
    """A run without held-out metrics."""


def named(directories: Sequence[str]) -> dict[str, str]:
    """Returns directories by name: the shortest end of each path that is unique."""
    parts = [pathlib.Path(directory).resolve().parts for directory in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, directories, strict=True))
    raise ValueError("the same directory is named twice.")


def read_rows(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl, without steps that a rollback discarded.

    Raises:
      FileNotFoundError: the directory holds no metrics.
      DamagedRowsError: a line is not a row of metrics, or a held-out metric names no source.
    """
    path = paths.join(directory, "metrics.jsonl")
    with contextlib.suppress(FileNotFoundError):
        path = mirror.local(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist: give the directory of a run (MODEL_DIR).")
    rows = rows_in_force(path)
    for row in rows:
        for name in row:
            if name.startswith(_HELD_OUT) and not re.fullmatch("eval/[^/]+/.+", name):
                raise DamagedRowsError(
                    f"{path}, the row of step {row['step']}: {name!r} is not the name of a held-out metric, "
                    "eval/SOURCE/METRIC. Take the file from a copy, or remove the row."
                )
    return rows


def last_evaluation(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the newest held-out metrics by domain; raises NotEvaluatedError if there are none."""
    evaluated = [row for row in rows if any(key.startswith(_HELD_OUT) for key in row)]
    if not evaluated:
        raise NotEvaluatedError(
            f"run {name!r} has no held-out evaluation yet: let it reach its end."
        )
    domains: dict[str, dict[str, float]] = {}
    for key, value in evaluated[-1].items():
        if key.startswith(_HELD_OUT):
            _, domain, metric = key.split("/", 2)
            domains.setdefault(domain, {})[metric] = value
    return {"step": evaluated[-1]["step"], "domains": domains}


def numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yields the finite numbers of a JSON value with their keys."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from numbers(below, f"{key}/{name}" if key else name)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield key, float(value)


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective as reports name it.

    Attributes:
      name: such as 'language modelling' or 'preference (dpo)'; empty if it is unknown.
      unit: unit of its loss; empty if it is unknown.
    """

    name: str = ""
    unit: str = ""


def objective_of(folder: str | os.PathLike) -> Objective:
    """Returns the objective of the run in a directory; one without name and unit if its config.gin names none."""
    from gin import config_parser  # here and below, what imports gin; a report's help needs none

    from espalier.launch.config import gin_source

    try:
        text = pathlib.Path(folder, gin_source.RUN_CONFIG).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return Objective()
    function, losses = "", ""
    for statement in gin_source.parse(text, gin_source.RUN_CONFIG):
        if not isinstance(statement, config_parser.BindingStatement):
            continue
        if statement.selector.endswith("Recipe") and statement.arg_name == "objective":
            function = _names(statement.value)
        elif statement.selector == _LOSSES:
            losses = _names(statement.value)
    name = function.replace("_", " ")
    if function == "preference" and losses:
        name = f"{name} ({losses})"
    return Objective(name, _units().get(function, ""))


@functools.cache
def _units() -> dict[str, str]:
    """Returns the unit of the loss of each objective by the function's name, as it declares it."""
    from espalier.launch.config import model_file

    return {name: unit for _, name, unit in model_file.marked("trainers", "loss_in")}


def _names(value: object) -> str:
    """Returns the last parts of the names of references, such as 'dpo, nll' of [@direct.dpo, @terms.nll]."""
    from espalier.launch.config import gin_source

    values = value if isinstance(value, list | tuple) else [value]
    names = [one.name for one in values if isinstance(one, gin_source.Reference)]
    return ", ".join(name.rpartition(".")[2] for name in names)
