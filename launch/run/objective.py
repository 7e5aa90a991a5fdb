"""The objective of a run, and the unit of its loss, by the run's config.gin."""

import dataclasses
import functools
import os
import pathlib

from gin import config_parser

from espalier.launch.config import gin_source, registered
from espalier.launch.run.model_record import CONFIG

_LOSSES = "LOSSES"  # the macro with the losses of a preference run


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective as reports name it.

    Attributes:
      name: such as 'language modelling' or 'preference (dpo)'; empty if it is unknown.
      unit: unit of its loss; empty if it is unknown.
    """

    name: str = ""
    unit: str = ""


def read(folder: str | os.PathLike) -> Objective:
    """Returns the objective of the run in a directory; one without name and unit if its config.gin names none."""
    try:
        text = pathlib.Path(folder, CONFIG).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return Objective()
    function, losses = "", ""
    for statement in gin_source.parse(text, CONFIG):
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
    return {name: unit for _, name, unit in registered.marked("trainers", "loss_in")}


def _names(value: object) -> str:
    """Returns the last parts of the names of references, such as 'dpo, nll' of [@direct.dpo, @terms.nll]."""
    values = value if isinstance(value, list | tuple) else [value]
    names = [one.name for one in values if isinstance(one, gin_source.Reference)]
    return ", ".join(name.rpartition(".")[2] for name in names)
