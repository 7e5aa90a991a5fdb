"""Makes flags from the parameters of dataclasses and functions: types, defaults and help texts have one source.

Also reads the values of flags that are sizes or Python files.

A library such as simple-parsing reads only dataclasses, with help texts from comments beside the fields, and adds a
quarter of a second to every --help.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Texts that a help text shows as more than TEXT; `cli` looks at paths.
File = Annotated[str, "FILE"]
Folder = Annotated[str, "DIR"]
Name = Annotated[str, "NAME"]
Names = Annotated[Sequence[str], "NAMES"]  # one flag with commas
MANY = "+"  # of Annotated[Sequence[int], MANY]: one flag with several values after it
REQUIRED = inspect.Parameter.empty
_METAVARS = {int: "N", float: "X", str: "TEXT", pathlib.Path: "PATH", bool: None}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A parameter of a dataclass or function, with the facts that a flag needs.

    Attributes:
      kind: its type, without None.
      optional: whether it may be None.
      default: its default; REQUIRED if it has none.
      text: its text in the docstring, under "Attributes:" or "Args:".
      metavar: what a help text shows for its value; None for a flag without a value.
    """

    kind: Any
    optional: bool
    default: Any
    text: str
    metavar: str | None


def settings_of(target: Any, names: Collection[str] | None = None) -> dict[str, Setting]:
    """Returns the settings of a dataclass or function by name.

    Args:
      target: a dataclass or function with parameters of type int, float, str, Path, bool, Literal, Sequence (of values of a
        repeatable flag), or one of these or None; File, Folder, Names and MANY of this module are for str and Sequence. An
        instance of a dataclass means its class with the instance's values as defaults.
      names: names of the parameters to return, in this order; None for all.

    Raises:
      TypeError: a parameter of another type, or without a text in the docstring.
    """
    defaults: Mapping[str, Any] = {}
    if dataclasses.is_dataclass(target) and not inspect.isclass(target):
        defaults, target = vars(target), type(target)
    hinted = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(hinted, include_extras=True)
    parameters, texts = inspect.signature(target).parameters, _texts(target)
    result = {}
    for name in names or parameters:
        kind = hints[name]
        optional = typing.get_origin(kind) in (types.UnionType, typing.Union)
        if optional:
            kind = next(option for option in typing.get_args(kind) if option is not type(None))
        kind, metavar = _shown(kind)
        if name not in texts or (
            kind not in _METAVARS and typing.get_origin(kind) not in (Literal, Sequence)
        ):
            raise TypeError(f"{target.__qualname__}.{name}: {kind} with text {texts.get(name)!r}")
        default = defaults.get(name, parameters[name].default)
        metavar = metavar or _METAVARS.get(kind)
        result[name] = Setting(kind, optional, default, texts[name], metavar)
    return result


def _shown(kind: Any) -> tuple[Any, str | None]:
    """Returns a type, and what a help text shows for it, if the annotation says so."""
    if typing.get_origin(kind) is not Annotated:
        return kind, None
    kind, *facts = typing.get_args(kind)
    return kind, next((fact for fact in facts if isinstance(fact, str)), None)


def _texts(target: Any) -> dict[str, str]:
    """Returns the texts under "Args:" or "Attributes:" of a docstring, of a class also of its bases, by parameter."""
    documented = reversed(target.__mro__) if inspect.isclass(target) else [target]
    entry = re.compile(r"^  (\w+(?:, \w+)*): (.*(?:\n {4}.*)*)", re.MULTILINE)
    result: dict[str, str] = {}
    for one in documented:
        doc = f"{inspect.getdoc(one)}\n"
        section = re.search(r"^(?:Args|Attributes):\n((?: .*\n|\n)+)", doc, re.MULTILINE)
        for names, text in entry.findall(section[1] if section else ""):
            result |= dict.fromkeys(names.split(", "), " ".join(text.split()).removesuffix("."))
    return result


def add(
    group: Any, target: Any, *, names: Collection[str] | None = None, optional: bool = False
) -> None:
    """Adds a flag for each setting of a dataclass or function; `given` reads them.

    A flag that the user does not set is absent from the parsed flags, so that only `target` has defaults.

    Args:
      group: parser or group of flags.
      target, names: see `settings_of`.
      optional: whether flags of settings without a default may be omitted.
    """
    for name, setting in settings_of(target, names).items():
        text = setting.text.replace("%", "%%")
        if setting.default not in (None, REQUIRED, "", ()) and setting.default is not False:
            default = setting.default
            text += f" (default {','.join(map(str, default)) if isinstance(default, tuple) else default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if setting.kind is bool:
            can_be_unset = setting.default or setting.optional
            options["action"] = argparse.BooleanOptionalAction if can_be_unset else "store_true"
        elif typing.get_origin(setting.kind) is Literal:
            options["choices"] = typing.get_args(setting.kind)
        elif typing.get_origin(setting.kind) is Sequence:
            kind, metavar = _shown(*typing.get_args(setting.kind))
            metavar = metavar or _METAVARS.get(kind)
            if setting.metavar == MANY:
                choices = typing.get_args(kind)
                options |= {"choices": choices} if choices else {"type": kind, "metavar": metavar}
                options["nargs"] = "+"
            elif setting.metavar is None:
                options |= {"action": "append", "type": kind, "metavar": metavar}
            else:
                options |= {"type": lambda text: tuple(text.split(",")), "metavar": setting.metavar}
        else:
            options |= {"type": setting.kind, "metavar": setting.metavar}
        if setting.default is REQUIRED:
            options["required"] = not optional
        group.add_argument(f"--{name}", **options)


def given(
    flags: argparse.Namespace, target: Callable[..., Any], names: Collection[str] | None = None
) -> dict[str, Any]:
    """Returns the arguments of a dataclass or function that the user set by flags, by name.

    Raises:
      ValueError: a number below the least one of its type, such as `common.ranges.Size`.
    """
    parameters = inspect.signature(target).parameters
    values = {name: getattr(flags, name) for name in names or parameters if hasattr(flags, name)}
    for name, value in values.items():
        least = _least(parameters[name].annotation)
        if least is not None and isinstance(value, int | float) and value < least:
            raise ValueError(f"--{name}={value} must be at least {least}.")
    return values


def _least(kind: Any) -> float | None:
    """Returns the least number that a type allows, also one such as `Size | None`; None for any."""
    options = (kind, *typing.get_args(kind))
    facts = (fact for option in options for fact in getattr(option, "__metadata__", ()))
    return next((fact.ge for fact in facts if getattr(fact, "ge", None) is not None), None)


def filled(flags: argparse.Namespace, target: Callable[..., Any]) -> Any:
    """Returns flags with the defaults of a dataclass for those that the user did not set."""
    return argparse.Namespace(**vars(target(**given(flags, target))) | vars(flags))


# Units of sizes on the command line, such as 500MB or 16MiB.
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str, flag: str) -> int:
    """Returns the bytes of a size; ValueError names the flag."""
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", text.upper())
    if not match or not int(match[1]):
        raise ValueError(f"--{flag}={text} is not a size: give one such as 500MB or 5GB.")
    return int(match[1]) * _UNITS[match[2] or ""]


class PythonConfigError(ValueError):
    """A file does not return a configuration."""


def python_config(file: str, text: str = "") -> "ConfigDict":
    """Returns what a file's `get_config` returns, called with the text unless that is empty.

    Raises:
      PythonConfigError: the file is no Python file, raises an error, or returns something else.
    """
    import ml_collections

    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise PythonConfigError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*([text] if text else []))
    except (Exception, SystemExit) as error:  # the file's code may raise any error
        raise PythonConfigError(
            f"get_config() could not be called: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise PythonConfigError(
            f"get_config() returned {type(config).__name__}; return ml_collections.ConfigDict."
        )
    return config
