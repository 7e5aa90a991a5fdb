"""Loads gin files and command-line bindings: all problems in one error, before any work.

Nothing is decorated with gin. Files begin with `from __gin__ import dynamic_registration`, import
modules and bind plain functions and classes. See docs/configuration.md.
"""

import dataclasses
import functools
import importlib
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin

from launch.config import gin_check, gin_hints, gin_source
from launch.config.gin_check import final_bound
from launch.config.gin_reader import Checked, is_required
from launch.config.gin_source import Place, Problem

# An unquoted value that is read as a string: a path or a name.
_BARE_STRING = re.compile(r"[A-Za-z_/.~][\w./~:+-]*")
# Literals of other languages, and the equivalent gin literals.
_WORDS = {
    **dict.fromkeys(("true", "yes", "on"), "True"),
    **dict.fromkeys(("false", "no", "off"), "False"),
    **dict.fromkeys(("none", "null"), "None"),
    **dict.fromkeys(("nan", "inf"), None),
}


class ConfigError(ValueError):
    """All problems of a configuration, in one message."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        numbered = [f"{i}. {problem}" for i, problem in enumerate(problems, 1)]
        super().__init__(f"{count} in the gin configuration:\n\n" + "\n\n".join(numbered) + "\n")


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration that gin has loaded and locked.

    Attributes:
      text: all bindings as one gin file that can be loaded again.
      entry: the function to call, with its bindings applied by gin.
      files: all read files in order, included ones too.
      macros: final values of the macros by name.
      warnings: bindings in files without effect on this run, unless a later file replaced the reference to their target.
    """

    text: str
    files: tuple[str, ...]
    macros: dict[str, Any]
    entry: Callable | None
    warnings: tuple[Problem, ...]

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments that gin would pass to the entry function, references evaluated."""
        return gin.get_bindings(self.entry)


def load(
    files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    entry: Callable | str | None = None,
    unused: Mapping[str, str] | None = None,
    defaults: Sequence[str] = (),
    part: bool = False,
    arguments: Sequence[str] | None = None,
) -> Config:
    """Checks a configuration completely, loads it into gin in place of the last one, and locks it.

    Args:
      files: gin files, absolute or relative to the working directory, to a search path or to the
        root of the repository; later ones win.
      bindings: 'NAME=VALUE' as after --gin. on the command line, read after the files. A path or
        name without quotes is read as a string, unless a number or other literal is expected.
      search_paths: more folders to look in.
      entry: the entry function of this configuration, or its name 'package.module:name'. With it,
        unbound arguments and bindings that cannot reach it are problems too.
      unused: macros whose values do not matter, with the value in gin syntax to use if none is set.
      defaults: gin files read before `files` that the user did not name, such as the model of a checkpoint's run.
      part: the configuration belongs to another entry point, and `entry` uses only a part of it. The
        rest may lack values, and bindings without effect are allowed.
      arguments: the arguments of `entry` that the caller uses; the others may lack values. None for all.

    Raises:
      ConfigError: with all problems; gin's own state is then unchanged.
    """
    function, name = _entry(entry)
    read = functools.partial(gin_check.check, files, search_paths=search_paths, defaults=defaults)
    checked, bindings = _check(
        bindings,
        read,
        unused,
        entry=function,
        entry_name=name,
        fragment=False,
        part=part,
        arguments=arguments,
    )
    if checked.problems:
        raise ConfigError(checked.problems)
    # Gin needs a value for every macro; those without one after the checks are not used.
    names = dict.fromkeys([*checked.macros, *checked.macros_read])
    bindings += [f"{name}=None" for name in names if _is_open(name, checked)]
    _load_into_gin([*defaults, *files], bindings, search_paths, checked)
    configured = None
    if function is not None:
        try:
            configured = gin.get_configurable(function)
        except (KeyError, ValueError):  # No file binds or references it.
            with gin.unlock_config():
                module = name.rpartition(".")[0]
                configured = gin.external_configurable(function, module=module)
    return Config(
        text=gin.config_str(),
        files=tuple(checked.files),
        macros={n: final_bound(m, checked.macros).value for n, m in checked.macros.items()},
        entry=configured,
        warnings=tuple(checked.warnings),
    )


def _is_open(name: str, checked: Checked) -> bool:
    return name not in checked.macros or is_required(checked.macros[name].value)


def _check(
    bindings: Sequence[str],
    read: Callable[..., Checked],
    unused: Mapping[str, str] | None = None,
    **how: Any,
) -> tuple[Checked, list[str]]:
    """Returns the checked configuration, and the bindings in gin syntax, `unused` macros included.

    The files are first read without bindings: whether a bare word is a string depends on their values.
    """
    unused = unused or {}
    from_files = read(fragment=True) if bindings or unused else Checked()
    set_here = {binding.partition("=")[0].strip() for binding in bindings}
    placeholders = [
        f"{name}={value}"
        for name, value in unused.items()
        if name not in set_here and name in from_files.macros_read and _is_open(name, from_files)
    ]
    malformed: list[Problem] = []
    normal = []
    for binding in [*bindings, *placeholders]:
        try:
            normal.append(_normalise(binding, from_files.macros))
        except ValueError as error:
            malformed.append(Problem(Place(f"--gin.{binding}"), str(error)))
    checked = read(normal, **how)
    checked.problems.extend(malformed)
    return checked, normal


def _normalise(binding: str, macros: dict) -> str:
    """Returns the binding in gin syntax, with quotes around a bare path or name."""
    name, equals, text = binding.partition("=")
    name, text = name.strip(), text.strip()
    if not equals or not name:
        raise ValueError("expected NAME=VALUE")
    bound = final_bound(macros[name], macros) if name in macros else None
    try:
        gin_source.parse_value(text)
        is_list = bound is not None and isinstance(bound.value, list | tuple)
        if is_list or not gin_hints.without_commas(text):  # 10,100 is also a tuple in gin syntax
            return f"{name}={text}"
    except SyntaxError:
        pass
    if bound is not None and is_required(bound.value):
        bound = None
    old = None if bound is None else bound.value
    takes_string = old is None or isinstance(old, str)
    if text.lower() in _WORDS or not takes_string or not _BARE_STRING.fullmatch(text):
        instead = f" (it was {old!r})" if not takes_string else ""
        meant = _WORDS.get(text.lower())
        hint = f" Did you mean {meant}?" if meant else ""
        remedy = gin_hints.of_text(name, text, bound)
        raise ValueError(f"{text!r} is not a value in gin syntax{instead}.{hint} {remedy}")
    return f"{name}={os.path.expanduser(text)!r}"


def _load_into_gin(files, bindings, search_paths, checked: Checked) -> None:
    gin.clear_config()
    # Gin can only append to its search path, which would make it depend on earlier loads.
    gin.config._LOCATION_PREFIXES[:] = gin_source.search_locations(search_paths)
    # Gin would also look for files in packages' resources, and fails on folders that are no packages.
    gin.config._FILE_READERS[:] = [(_open, os.path.isfile)]
    imports = [statement.format() for statement in checked.command_line_imports()]
    if imports:
        imports.insert(0, "from __gin__ import dynamic_registration")
    try:
        for path in files:
            gin.parse_config_file(path)
        gin.parse_config([*imports, *bindings])
        gin.finalize()
    except Exception as error:
        # A problem that the checks missed; gin's message names its place.
        raise ConfigError([Problem(Place("gin"), str(error))]) from error


def _open(path: str) -> io.StringIO:
    file: Any = io.StringIO(gin_source.read(path))
    file.name = path  # gin reads it
    return file


def _entry(entry: Callable | str | None) -> tuple[Callable | None, str]:
    if entry is None:
        return None, ""
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        return getattr(importlib.import_module(module), attribute), f"{module}.{attribute}"
    return entry, f"{entry.__module__}.{entry.__qualname__}"
