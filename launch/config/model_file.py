"""model.json: a run's model as data, which is read without running anything that its author named.

Reading config.gin imports the modules and calls the functions in it. A run therefore also records the part of config.gin
that makes its model, as literals and the names in REGISTERED:

    {"format": "espalier model 1",
     "macros": {"MODEL": {"call": "transformer.Transformer"}, "DTYPE": "float32"},
     "settings": {"transformer.Transformer.block": {"factory": "transformer.Block"}, "config.TransformerConfig.num_layers": 2}}

`{"call": "scope/name"}` is gin's `@scope/name()`, `{"factory": "scope/name"}` its `@scope/name`, `{"macro": "NAME"}` its `%NAME`,
`{"tuple": [...]}` a tuple, `{"dict": [[key, value], ...]}` a dictionary. The file can be used like a gin file, which it equals,
so that gin files and bindings can change the model.

Whoever reads it calls only the objects in REGISTERED. All of them build a part of a model or a number from their arguments; none
reads or writes files, or starts anything. Their names stay valid when a file moves.
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

from espalier.launch import environment
from espalier.launch.config.values import Macro, Reference, leaves
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


_INITIALIZERS = (
    "constant",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "ones",
    "orthogonal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "zeros",
)


def marked(package: str, mark: str) -> Iterator[tuple[str, str, str]]:
    """Yields (module, name, argument) of the classes and functions of a package that a decorator marks.

    The source is read, and nothing is imported. The mark is the first decorator, `@mark` or `@mark("argument")`.
    """
    pattern = re.compile(rf'^@{mark}(?:\("(.*)"\))?\n(?:@.*\n)*(?:class|def) (\w+)', re.MULTILINE)
    root = pathlib.Path(environment.ROOT)
    for path in sorted((root / package).rglob("*.py")):
        for argument, name in pattern.findall(path.read_text("utf-8")):
            module = path.relative_to(root).with_suffix("").parts
            yield ".".join(("espalier", *module)), name, argument


def _parts() -> dict[str, tuple[str, str]]:
    """Returns the parts of models by name."""
    places: dict[str, tuple[str, str]] = {}
    for module, name, _ in marked("model", "recordable"):
        key = f"{module.rpartition('.')[2]}.{name}"
        assert key not in places, f"two files of model/ have a recordable {key}"
        places[key] = (module, name)
    return places


# Name in a record, such as 'mlp.GatedMlp' -> module and attribute. In model/ they are those marked as `recordable`
# (espalier/common/ranges.py).
REGISTERED: dict[str, tuple[str, str]] = {
    **_parts(),
    **{f"initializers.{name}": ("jax.nn.initializers", name) for name in _INITIALIZERS},
}


class ModelFileError(ValueError):
    """A file that is not the record of a model."""


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A checked record of a model.

    Attributes:
      macros: values by name.
      settings: values by (scope with its slash or '', name, argument).
    """

    macros: Mapping[str, Any]
    settings: Mapping[tuple[str, str, str], Any]

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
        value: Any = Macro(MODEL)
        while isinstance(value, Macro):
            [value] = _named(self.macros[value.name])
        return value.name[: -len(value.selector)], value.selector

    def gin(self) -> str:
        """Returns the equal gin text."""
        short = module_names({_home(name)[0] for name in self._names()})
        text = {
            name: f"{short[module]}.{attribute}"
            for name in self._names()
            for module, attribute in [_home(name)]
        }
        lines = ["from __gin__ import dynamic_registration", "", *import_lines(short), ""]
        lines += [f"{name} = {_text(value, text)}" for name, value in self.macros.items()]
        lines += [
            f"{scope}{text[name]}.{argument} = {_text(value, text)}"
            for (scope, name, argument), value in self.settings.items()
        ]
        return "\n".join(lines) + "\n"

    def _names(self) -> dict[str, None]:
        """Returns all names of functions and classes, once each."""
        parts = _named((*self.macros.values(), *self.settings.values()))
        names = [name for _, name, _ in self.settings]
        names += [part.selector for part in parts if isinstance(part, Reference)]
        return dict.fromkeys(names)

    @property
    def foreign(self) -> list[tuple[str, str]]:
        """(module, attribute) of all names outside of this project."""
        return [_home(name) for name in self._names() if name not in REGISTERED]


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
    """Returns whether a path is that of a model.json."""
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
    keys = {}
    for key in settings:
        match = _SETTING.fullmatch(key)
        if match is None:
            raise ModelFileError(f'"settings": {key!r} is not the name of a setting')
        scope, name, argument = match.groups()
        keys[key] = (scope, _known(name, key), argument)
    values = {key: _value(value, key) for key, value in [*macros.items(), *settings.items()]}
    for key, value in values.items():
        for part in _named(value):
            if isinstance(part, Reference):
                _known(part.selector, key)
            elif part.name not in macros:
                raise ModelFileError(f"{key}: there is no macro {part.name!r}")
    read = ModelFile(
        {name: values[name] for name in macros}, {keys[key]: values[key] for key in settings}
    )
    _check_size(read)
    return read


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _known(name: str, key: str) -> str:
    """Returns a name, unless it is an unknown one of this project, whose other functions can do anything."""
    own = (PACKAGE, *EARLIER_PACKAGES)
    foreign = ":" in name and name.partition(":")[0].partition(".")[0] not in own
    if name not in REGISTERED and not foreign:
        raise ModelFileError(
            f"{key}: {name!r} is not a part of a model that this version knows (launch/config/model_file.py)"
        )
    return name


def _home(name: str) -> tuple[str, str]:
    """Returns the module and the attribute of a name."""
    if name in REGISTERED:
        return REGISTERED[name]
    module, _, attribute = name.partition(":")
    return module, attribute


def _value(item: Any, key: str, depth: int = 0) -> Any:
    """Returns the value of an item in one of the forms in the module's docstring; raises ModelFileError for any other."""

    def inner(part: Any) -> Any:
        return _value(part, key, depth + 1)

    if depth > _MAX_DEPTH:
        raise ModelFileError(f"{key}: more than {_MAX_DEPTH} lists inside each other")
    if isinstance(item, float) and not math.isfinite(item):
        raise ModelFileError(f"{key}: {item} is not a value")
    if item is None or isinstance(item, str | bool | int | float):
        return item
    if isinstance(item, list):
        return list(map(inner, item))
    content: Any
    [(kind, content)] = item.items() if len(item) == 1 else [("", None)]
    if kind == "macro" and isinstance(content, str) and _MACRO.fullmatch(content):
        return Macro(content)
    named = kind in ("call", "factory") and isinstance(content, str)
    if named and _REFERENCE.fullmatch(content):
        return Reference(content, kind == "call")
    if kind == "tuple" and isinstance(content, list):
        return tuple(map(inner, content))
    pairs = kind == "dict" and isinstance(content, list)
    if not pairs or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        raise ModelFileError(f"{key}: {json.dumps(item)[:80]} is not a value")
    if any(isinstance(key_of_pair, list | dict) for key_of_pair, _ in content):
        raise ModelFileError(f"{key}: {json.dumps(item)[:80]} has a key that is not a literal")
    return {inner(key_of_pair): inner(part) for key_of_pair, part in content}


def _named(value: Any) -> list[Reference | Macro]:
    """Returns the references and macros in a value."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Reference | Macro)]


def _check_size(read: ModelFile) -> None:
    """Raises ModelFileError if references form a circle or a long chain, or multiply to an endless model."""
    values: dict[str, list[Any]] = {f"%{name}": [value] for name, value in read.macros.items()}
    for (_, name, _), value in read.settings.items():
        values.setdefault(name, []).append(value)
    sizes: dict[str, int] = {}

    def size(node: str, chain: tuple[str, ...]) -> int:
        if node in chain:
            raise ModelFileError(f"{node!r} is a part of itself")
        if len(chain) > _MAX_CHAIN:
            raise ModelFileError(f"more than {_MAX_CHAIN} parts inside each other")
        if node not in sizes:
            parts = _named(values.get(node, []))
            names = [repr(p) if isinstance(p, Macro) else p.selector for p in parts]
            total = 1 + sum(size(name, (*chain, node)) for name in names)
            if total > _MAX_PARTS:
                raise ModelFileError(f"{node!r} has more than {_MAX_PARTS} parts")
            sizes[node] = total
        return sizes[node]

    for node in values:
        size(node, ())


def _text(value: Any, names: Mapping[str, str]) -> str:
    """Returns a value in gin syntax, with the text of each name."""
    if isinstance(value, Reference):
        return repr(value.renamed(names[value.selector]))
    if isinstance(value, list):
        return f"[{', '.join(_text(part, names) for part in value)}]"
    if isinstance(value, tuple):
        return f"({''.join(f'{_text(part, names)}, ' for part in value)})"
    if isinstance(value, dict):
        pairs = (f"{_text(k, names)}: {_text(v, names)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    return repr(value)
