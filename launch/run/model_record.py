"""Writes model.json, the record of a run's model (launch/config/model_file.py), from the run's config.gin."""

import os
import pathlib
from typing import Any

from espalier.common import files
from espalier.launch.config import gin_source, model_file
from espalier.launch.config.gin_reader import Bound, Checked, Reader, Target, prefixes
from espalier.launch.config.model_file import REGISTERED
from espalier.launch.config.values import Macro, Reference, scoped

CONFIG = gin_source.RUN_CONFIG


def with_param_dtype(config: str, model: Any, dtype: str) -> str:
    """Returns the text of a configuration whose model has parameters of another dtype, as a run stores them."""
    sizes = type(model.config)
    name = sizes.__module__.rpartition(".")[2]
    lines = model_file.import_lines({sizes.__module__: name})
    binding = f"{name}.{sizes.__name__}.param_dtype = {dtype!r}"
    return "\n".join([config.rstrip("\n"), *lines, binding, ""])


def write(folder: str | os.PathLike) -> None:
    """Writes the model in the config.gin of a run's directory; nothing if it sets no MODEL.

    Raises:
      ModelFileError: the model has settings that a record cannot hold, such as infinity.
    """
    reader = Reader()
    reader.read_file(os.path.join(folder, CONFIG))
    if model_file.MODEL not in reader.checked.macros:
        return
    path = pathlib.Path(folder, model_file.NAME)
    files.write_json(path, _record(reader.checked), synced=True)  # steps are read by it
    model_file.read(path)  # raises if the record cannot be read back


def _record(checked: Checked) -> dict[str, Any]:
    """Returns the JSON form of MODEL and of all bindings that it reaches.

    Bindings in a scope are recorded if a recorded value enters the scope.
    """
    macros: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    reached: set[str] = set()  # names of functions and classes
    scopes = {""}

    def record(bound: Bound) -> Any:
        for reference in bound.references:
            reached.add(reference.target.name)
            scopes.update(prefixes(reference.scope))
        for macro in bound.macros:
            scopes.update(prefixes(macro))  # its value is evaluated in this scope
            define(macro)
        return _json(bound.value)

    def define(name: str) -> None:
        if name not in macros and name in checked.macros:
            macros[name] = None  # so that a circle ends
            macros[name] = record(checked.macros[name])

    define(model_file.MODEL)
    size = -1
    while size != (size := len(settings)):
        for (scope, name, argument), bound in checked.bindings.items():
            if name in reached and scope in scopes:
                key = f"{scoped(scope, _name(checked.targets[name]))}.{argument}"
                settings.setdefault(key, record(bound))
    return {
        "format": model_file.FORMAT,
        "macros": dict(sorted(macros.items())),
        "settings": dict(sorted(settings.items())),
    }


def _name(target: Target) -> str:
    """Returns the registered name of an object, or 'module:attribute'."""
    home = (target.value.__module__, target.value.__qualname__)
    for name, registered in REGISTERED.items():
        if registered == home or ".".join(registered) == target.name:
            return name
    return ":".join(home)


def _json(value: Any) -> Any:
    """Returns the JSON form of a value."""
    if isinstance(value, list):
        return [_json(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_json(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_json(k), _json(v)] for k, v in value.items()]}
    if isinstance(value, Macro):
        return {"macro": value.name}
    if isinstance(value, Reference) and value.target is not None:
        kind = "call" if value.evaluate else "factory"
        return {kind: value.renamed(_name(value.target)).name}
    return value
