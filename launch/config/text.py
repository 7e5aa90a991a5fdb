"""Writes a configuration as gin text, in the form in which gin writes one, which recorded runs have; and compares such texts.

They are compared by meaning: names in full, values as literals, order ignored.
"""

import contextlib
import functools
import inspect
import pprint
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gin import config_parser

from espalier.launch.config import gin_source
from espalier.launch.config.gin_reader import Bound, Target
from espalier.launch.config.gin_source import DYNAMIC_REGISTRATION, is_written_as_itself
from espalier.launch.config.values import Problem, Reference, scoped

_WIDTH = 80
_INDENT = 4  # of a value's lines that do not fit beside its name
_RULE = f"# {'=' * (_WIDTH - 2)}"
_NOWHERE = config_parser.Location(None, 0, None, "")


def gin(
    imports: Iterable[config_parser.ImportStatement],
    macros: Mapping[str, Bound],
    settings: Mapping[tuple[str, Target], Mapping[str, Bound]],
) -> str:
    """Returns gin text: imports, macros, and the bindings of each function or class in each scope.

    Args:
      imports: import statements of all files.
      macros: definitions by name.
      settings: bindings by argument, of (scope, target).
    """
    names = _Names(imports)
    for _, target in settings:
        names.require(target)
    for bound in (*macros.values(), *(b for values in settings.values() for b in values.values())):
        for reference in bound.references:
            names.require(reference.target)
    lines = [statement.format() for statement in names.imports()]
    if lines:
        lines.append("")
    if macros:
        lines += ["# Macros:", _RULE]
        order = sorted(macros, key=lambda name: name.lower().split("/")[::-1])
        lines += [_binding(name, macros[name].named(names.of)) for name in order]
        lines.append("")
    for (scope, target), values in sorted(settings.items(), key=_order):
        name = scoped(scope, names.of(target))
        lines += [f"# Parameters for {name}:", _RULE]
        written = [
            _binding(f"{name}.{argument}", bound.named(names.of))
            for argument, bound in sorted(values.items(), key=lambda item: item[0])
            if is_written_as_itself(bound.value)
        ]
        lines += [*(written or ["# None."]), ""]
    return "\n".join(lines)


def _binding(name: str, value: Any) -> str:
    """Returns `name = value`, in one line if it fits."""
    value_lines = pprint.pformat(value, width=_WIDTH - _INDENT).split("\n")
    if len(value_lines) == 1 and len(name + value_lines[0]) <= _WIDTH:
        return f"{name} = {value_lines[0]}"
    return "\n".join([f"{name} = \\", *(" " * _INDENT + line for line in value_lines)])


def _order(item: tuple[tuple[str, Target], Any]) -> list[str]:
    """Returns the key by which bindings are sorted: the innermost names first, without case."""
    (scope, target), _ = item
    parts = target.path().lower().split(".")[::-1]
    if target.is_method:  # beside its class
        method, owner, *rest = parts
        parts = [f"{owner}.{method}", *rest]
    return parts + scope.lower().split("/")[::-1]


class _Names:
    """The short names of modules in a file, each imported once under a name of its own."""

    def __init__(self, statements: Iterable[config_parser.ImportStatement]):
        self._statements: list[config_parser.ImportStatement] = []
        self._modules: dict[str, str] = {}  # module -> its name in the file
        self._taken: set[str] = set()
        statements = list(statements)
        if statements:
            self._add(config_parser.ImportStatement(DYNAMIC_REGISTRATION, True, None, _NOWHERE))
        for statement in sorted(statements, key=lambda s: (s.module, not s.is_from)):
            self._add(statement)

    def imports(self) -> list[config_parser.ImportStatement]:
        return sorted(self._statements, key=lambda s: s.module)

    def require(self, target: Target) -> None:
        self._add(target.home[0])

    def of(self, target: Target) -> str:
        """Returns the name of a function or class by the imports."""
        statement, attribute = target.home
        return f"{self._modules[statement.module]}.{attribute}"

    def _add(self, statement: config_parser.ImportStatement) -> None:
        if statement.module in self._modules:
            return
        wanted = statement.bound_name()
        name = next(n for n in _numbered(wanted) if n not in self._taken)
        if name != wanted:
            statement = statement._replace(alias=name)
        by_name = statement.is_from or statement.alias
        self._modules[statement.module] = statement.bound_name() if by_name else statement.module
        self._taken.add(statement.bound_name())
        self._statements.append(statement)


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}{number}"
        number += 1


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
