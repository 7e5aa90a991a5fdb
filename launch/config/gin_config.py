"""Loads gin files and command-line bindings: all problems in one error, before any work.

Nothing of this project is decorated with gin, and gin's own state is not used. Files begin with `from __gin__ import dynamic_registration`, import
modules and bind plain functions and classes. See docs/configuration.md.
"""

import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.launch.config import gin_check, gin_hints, gin_source
from espalier.launch.config.build import Configuration
from espalier.launch.config.gin_reader import Bound, Checked, final_bound, is_required
from espalier.launch.config.gin_source import Place, Problem

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


def load(
    files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    entry: Callable | str | None = None,
    unused: Mapping[str, str] | None = None,
    defaults: Sequence[str] = (),
    part: bool = False,
    arguments: Sequence[str] | None = None,
) -> Configuration:
    """Returns a configuration that was checked completely.

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
      ConfigError: with all problems.
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
    # Macros without a value after the checks are not used; the text of the configuration says so.
    without = [n for n in (*checked.macros, *checked.macros_read) if _is_open(n, checked)]
    nothing = dict.fromkeys(without, Bound(None, Place("without a value"), (), ()))
    tree = dataclasses.replace(checked, macros={**checked.macros, **nothing})
    configuration = Configuration(tree, name)
    try:
        configuration.give_to_gin()
    except ValueError as error:  # gin's message names the argument
        raise ConfigError([Problem(Place("gin"), str(error))]) from error
    return configuration


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


def _entry(entry: Callable | str | None) -> tuple[Callable | None, str]:
    if entry is None:
        return None, ""
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        return getattr(importlib.import_module(module), attribute), f"{module}.{attribute}"
    return entry, f"{entry.__module__}.{entry.__qualname__}"
