"""Compares two gin configurations by meaning: names in full, values as literals, order ignored."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Sequence
from typing import Any

from gin import config_parser

from espalier.launch.config import gin_source
from espalier.launch.config.gin_source import Problem, Reference, scoped


class UnreadableConfigError(ValueError):
    """Text that is not a gin configuration."""


def canonical(text: str) -> dict[str, str]:
    """Returns every binding and macro of a self-contained gin file: full name, of a moved module that of today -> value."""
    modules: dict[str, str] = {}
    values: dict[str, str] = {}
    for statement in gin_source.parse(text, "config.gin"):
        if isinstance(statement, Problem):
            raise UnreadableConfigError(str(statement))
        if isinstance(statement, config_parser.ImportStatement):
            modules[statement.bound_name()] = gin_source.bound_module(statement)
        elif isinstance(statement, config_parser.BindingStatement):
            name = _full(statement.selector, modules)
            key = f"{name}.{statement.arg_name}" if statement.arg_name else statement.selector
            values[scoped(statement.scope, key)] = _format(statement.value, modules)
    return values


def is_readable(text: str) -> bool:
    try:
        canonical(text)
    except UnreadableConfigError:
        return False
    return True


def first_difference(old: str, new: str, may_change: Sequence[str] = ()) -> str | None:
    """Returns a sentence about the first binding, sorted by name, that differs; None if none differs.

    A binding that one configuration lacks is no difference if it sets its parameter to the default, and nor is a macro
    that such bindings alone read; so a run goes on although a later version of a gin file has more settings.

    Args:
      old: text of the earlier configuration.
      new: text of the new configuration.
      may_change: macros and bindings that are not compared, by any dotted part of their names: 'TRAIN_STEPS',
        'train.eval_period', or 'ProfilerWindow' for all of its parameters.
    """
    there, here = canonical(old), canonical(new)
    for key, (before, after) in _differences([there, here], may_change).items():
        if after is None:
            if not _has_no_effect(key, there):
                return f"{key} was {before} there and is not set now"
        elif before is None:
            if not _has_no_effect(key, here):
                return f"{key} is {after} now and was not set there"
        else:
            return f"{key} was {before} there and is {after} now"
    return None


def differences(texts: Sequence[str], leave_out: Sequence[str] = ()) -> dict[str, list[str | None]]:
    """Returns each binding that differs between configurations, with its value in each; None where it is not set.

    Args:
      texts: of the configurations.
      leave_out: macros and bindings that are not compared, as `may_change` of `first_difference`.

    Raises:
      UnreadableConfigError: a text is not a gin configuration.
    """
    return _differences([canonical(text) for text in texts], leave_out)


def _differences(
    read: Sequence[dict[str, str]], leave_out: Sequence[str]
) -> dict[str, list[str | None]]:
    # Macros first: users set these, and the bindings follow from them.
    keys = sorted({key for values in read for key in values}, key=lambda k: ("." in k, k))
    by_key = {key: [values.get(key) for values in read] for key in keys}
    return {
        key: values
        for key, values in by_key.items()
        if len(set(values)) > 1 and not _matches(key, leave_out)
    }


def _has_no_effect(key: str, values: dict[str, str]) -> bool:
    """Returns whether a binding sets its parameter to the default, or whether all bindings that read a macro do."""
    *path, parameter = key.rpartition("/")[2].split(".")
    if not path:
        readers = [name for name, value in values.items() if value == f"%{key}"]
        return bool(readers) and all(_has_no_effect(name, values) for name in readers)
    value = values[key]
    while value.startswith("%") and value[1:] in values:
        value = values[value[1:]]
    for end in range(len(path) - 1, 0, -1):
        if (found := sys.modules.get(".".join(path[:end]))) is not None:
            with contextlib.suppress(AttributeError, TypeError, ValueError, KeyError):
                target: Any = functools.reduce(getattr, path[end:], found)
                default = inspect.signature(target).parameters[parameter].default
                return value == _format(default, {})
            return False
    return False


def _matches(key: str, names: Sequence[str]) -> bool:
    dotted = f".{key.replace('/', '.')}."
    return any(f".{name}." in dotted for name in names)


def _full(selector: str, modules: dict[str, str]) -> str:
    head, dot, rest = selector.partition(".")
    return modules.get(head, head) + dot + rest


def _format(value: Any, modules: dict[str, str]) -> str:
    if isinstance(value, Reference):
        return repr(value.renamed(_full(value.selector, modules)))
    if isinstance(value, dict):
        items = sorted((_format(k, modules), _format(v, modules)) for k, v in value.items())
        return "{" + ", ".join(f"{k}: {v}" for k, v in items) + "}"
    if isinstance(value, list | tuple):
        inner = ", ".join(_format(item, modules) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return repr(value)
