"""model.json: a run's model as data, which is read without running anything that its author named.

Reading config.gin imports the modules and calls the functions in it. A run therefore also records the part of config.gin
that makes its model, as literals and names of launch/config/registered.py:

    {"format": "espalier model 1",
     "macros": {"MODEL": {"call": "transformer.Transformer"}, "DTYPE": "float32"},
     "settings": {"transformer.Transformer.block": {"factory": "transformer.Block"}, "config.TransformerConfig.num_layers": 2}}

`{"call": "scope/name"}` is gin's `@scope/name()`, `{"factory": "scope/name"}` its `@scope/name`, `{"macro": "NAME"}` its `%NAME`,
`{"tuple": [...]}` a tuple, `{"dict": [[key, value], ...]}` a dictionary. The file can be used like a gin file, which it equals,
so that gin files and bindings can change the model.

The name of a class outside of this project is 'package.module:Class'. Its package is imported only if the user's own gin files
import that module.
"""

import dataclasses
import importlib
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from espalier.launch.config.registered import REGISTERED
from espalier.launch.environment import EARLIER_PACKAGES
from espalier.launch.input_errors import PACKAGE

NAME = "model.json"
MODEL = "MODEL"  # the macro with the model
FORMAT = "espalier model 1"

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 20  # of lists and dictionaries inside each other
_MAX_CHAIN = 50  # of parts inside each other
_MAX_PARTS = 100_000  # of the model's settings, counted as often as they are used
_SCOPED = r"(?:[A-Za-z_]\w*/)*"
_NAME = r"[A-Za-z_]\w*\.[A-Za-z_]\w*|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
_MACRO = re.compile(rf"{_SCOPED}[A-Za-z_]\w*", re.ASCII)
_REFERENCE = re.compile(rf"({_SCOPED})({_NAME})", re.ASCII)
_SETTING = re.compile(rf"({_SCOPED})({_NAME})\.([A-Za-z_]\w*)", re.ASCII)


class ModelFileError(ValueError):
    """A file that is not the record of a model."""


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A checked record of a model.

    Attributes:
      macros: values in JSON form by name.
      settings: values in JSON form by (scope with its slash or '', name, argument).
      foreign: (module, attribute) of all names outside of this project.
    """

    macros: Mapping[str, Any]
    settings: Mapping[tuple[str, str, str], Any]
    foreign: tuple[tuple[str, str], ...]

    @property
    def inference_part(self) -> str:
        """The name of the model's part for inference, see model/protocol.py; '' for the whole model."""
        module, attribute = _home(self._model()[1])
        known = self._model()[1] in REGISTERED  # only files of the user's own import other modules
        home = importlib.import_module(module) if known else sys.modules.get(module)
        return getattr(getattr(home, attribute, None), "inference_part", "")

    def for_inference(self) -> "ModelFile":
        """Returns the record of that part as a model of its own."""
        part = self.inference_part
        if not part:
            return self
        scope, name = self._model()
        value = self.settings.get((scope, name, part)) or self.settings["", name, part]
        settings = {key: value for key, value in self.settings.items() if key[1] != name}
        return dataclasses.replace(self, macros={**self.macros, MODEL: value}, settings=settings)

    def _model(self) -> tuple[str, str]:
        """Returns the scope and the name of the model's class or function."""
        value = self.macros[MODEL]
        while True:
            [(kind, scope, name)] = _references(value)
            if kind != "macro":
                return scope, name
            value = self.macros[name]

    def gin(self) -> str:
        """Returns the equal gin text."""
        names = {name for _, name, _ in self.settings}
        for value in (*self.macros.values(), *self.settings.values()):
            names |= {name for kind, _, name in _references(value) if kind != "macro"}
        short = module_names({_home(name)[0] for name in names})
        text = {
            name: f"{short[module]}.{attribute}"
            for name in names
            for module, attribute in [_home(name)]
        }
        lines = ["from __gin__ import dynamic_registration", "", *import_lines(short), ""]
        lines += [f"{name} = {_text(value, text)}" for name, value in self.macros.items()]
        lines += [
            f"{scope}{text[name]}.{argument} = {_text(value, text)}"
            for (scope, name, argument), value in self.settings.items()
        ]
        return "\n".join(lines) + "\n"


def module_names(modules: Iterable[str]) -> dict[str, str]:
    """Returns a short name for each module: its last part, or its whole path if that name is taken."""
    short: dict[str, str] = {}
    for module in sorted(modules):
        last = module.rpartition(".")[2]
        short[module] = module.replace(".", "_") if last in short.values() else last
    return short


def import_lines(short: Mapping[str, str]) -> list[str]:
    """Returns gin's import statements of modules under their short names."""
    lines = []
    for module, name in sorted(short.items()):
        package, _, last = module.rpartition(".")
        imported = f"from {package} import {last}" if package else f"import {last}"
        lines.append(imported if name == last else f"{imported} as {name}")
    return lines


def is_model_file(path: str | os.PathLike) -> bool:
    return os.path.basename(path) == NAME


def read(path: str | os.PathLike) -> ModelFile:
    """Returns the checked content of a model.json; imports and calls nothing.

    Raises:
      ModelFileError: the file is damaged, too large, or not a record of a model.
      OSError: it cannot be read.
    """
    with pathlib.Path(path).open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        if len(data) > _MAX_BYTES:
            raise ModelFileError(f"it is larger than {_MAX_BYTES >> 20} MiB")
        return _parse(data)
    except ModelFileError as error:
        raise ModelFileError(f"{os.fspath(path)} is not the record of a model: {error}.") from None


def _parse(data: bytes) -> ModelFile:
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"it is damaged ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(f'"format" is not "{FORMAT}"')
    macros, settings = content.get("macros"), content.get("settings")
    if not isinstance(macros, dict) or not isinstance(settings, dict):
        raise ModelFileError('"macros" and "settings" must be objects')
    for name in macros:
        if not _MACRO.fullmatch(name):
            raise ModelFileError(f'"macros": {name!r} is not the name of a macro')
    by_key = {}
    for key in settings:
        match = _SETTING.fullmatch(key)
        if match is None:
            raise ModelFileError(f'"settings": {key!r} is not the name of a setting')
        scope, name, argument = match.groups()
        by_key[scope, _known(name, key), argument] = settings[key]
    for key, value in [*macros.items(), *settings.items()]:
        _check(value, key)
        for kind, _, name in _references(value):
            if kind != "macro":
                _known(name, key)
            elif name not in macros:
                raise ModelFileError(f"{key}: there is no macro {name!r}")
    _check_size(macros, by_key)
    names = [name for _, name, _ in by_key]
    names += [
        n
        for v in [*macros.values(), *settings.values()]
        for k, _, n in _references(v)
        if k != "macro"
    ]
    foreign = dict.fromkeys(_home(name) for name in names if name not in REGISTERED)
    return ModelFile(macros, by_key, tuple(foreign))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _known(name: str, key: str) -> str:
    """Returns a name, unless it is an unknown one of this project, whose other functions can do anything."""
    own = (PACKAGE, *EARLIER_PACKAGES)
    foreign = ":" in name and name.partition(":")[0].partition(".")[0] not in own
    if name not in REGISTERED and not foreign:
        raise ModelFileError(
            f"{key}: {name!r} is not a part of a model that this version knows (launch/config/registered.py)"
        )
    return name


def _home(name: str) -> tuple[str, str]:
    """Returns the module and the attribute of a name."""
    if name in REGISTERED:
        return REGISTERED[name]
    module, _, attribute = name.partition(":")
    return module, attribute


def _check(value: Any, key: str, depth: int = 0) -> None:
    """Raises ModelFileError unless a value has one of the forms in the module's docstring."""
    if depth > _MAX_DEPTH:
        raise ModelFileError(f"{key}: more than {_MAX_DEPTH} lists inside each other")
    if isinstance(value, float) and not math.isfinite(value):
        raise ModelFileError(f"{key}: {value} is not a value")
    if value is None or isinstance(value, str | bool | int | float):
        return
    if isinstance(value, list):
        parts = value
    else:
        content: Any
        [(kind, content)] = value.items() if len(value) == 1 else [("", None)]
        pattern = {"call": _REFERENCE, "factory": _REFERENCE, "macro": _MACRO}.get(kind)
        if pattern is not None and isinstance(content, str) and pattern.fullmatch(content):
            return
        pairs = kind == "dict" and isinstance(content, list)
        if pairs and all(isinstance(pair, list) and len(pair) == 2 for pair in content):
            if any(isinstance(key_of_pair, list | dict) for key_of_pair, _ in content):
                raise ModelFileError(
                    f"{key}: {json.dumps(value)[:80]} has a key that is not a literal"
                )
            parts = [part for pair in content for part in pair]
        elif kind == "tuple" and isinstance(content, list):
            parts = content
        else:
            raise ModelFileError(f"{key}: {json.dumps(value)[:80]} is not a value")
    for part in parts:
        _check(part, key, depth + 1)


def _references(value: Any) -> Iterator[tuple[str, str, str]]:
    """Yields (kind, scope with its slash or '', name) of the references and macros in a checked value."""
    if isinstance(value, dict):
        [(kind, content)] = value.items()
        if kind == "macro":
            yield kind, "", content
        elif kind in ("call", "factory"):
            match = _REFERENCE.fullmatch(content)
            assert match is not None
            yield kind, *match.groups()
        else:
            yield from _references(content)
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)


def _check_size(macros: Mapping[str, Any], settings: Mapping[tuple[str, str, str], Any]) -> None:
    """Raises ModelFileError if references form a circle or a long chain, or multiply to an endless model."""
    values: dict[str, list[Any]] = {f"%{name}": [value] for name, value in macros.items()}
    for (_, name, _), value in settings.items():
        values.setdefault(name, []).append(value)
    sizes: dict[str, int] = {}

    def size(node: str, chain: tuple[str, ...]) -> int:
        if node in chain:
            raise ModelFileError(f"{node!r} is a part of itself")
        if len(chain) > _MAX_CHAIN:
            raise ModelFileError(f"more than {_MAX_CHAIN} parts inside each other")
        if node not in sizes:
            parts = [part for value in values.get(node, ()) for part in _references(value)]
            names = [f"%{name}" if kind == "macro" else name for kind, _, name in parts]
            total = 1 + sum(size(name, (*chain, node)) for name in names)
            if total > _MAX_PARTS:
                raise ModelFileError(f"{node!r} has more than {_MAX_PARTS} parts")
            sizes[node] = total
        return sizes[node]

    for node in values:
        size(node, ())


def _text(value: Any, names: Mapping[str, str]) -> str:
    """Returns a checked value in gin syntax, with the text of each name."""
    if isinstance(value, list):
        return f"[{', '.join(_text(part, names) for part in value)}]"
    if not isinstance(value, dict):
        return repr(value)
    [(kind, content)] = value.items()
    if kind == "macro":
        return f"%{content}"
    if kind == "tuple":
        return f"({''.join(f'{_text(part, names)}, ' for part in content)})"
    if kind == "dict":
        pairs = (f"{_text(k, names)}: {_text(v, names)}" for k, v in content)
        return f"{{{', '.join(pairs)}}}"
    [(_, scope, name)] = _references(value)
    return f"@{scope}{names[name]}{'()' if kind == 'call' else ''}"
