"""Writes a configuration as gin text, in the form in which gin writes one, which recorded runs have."""

import pprint
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gin import config_parser

from espalier.launch.config.gin_reader import Bound, Target
from espalier.launch.config.gin_source import (
    DYNAMIC_REGISTRATION,
    is_written_as_itself,
    scoped,
)

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
        for _, referred in bound.references:
            if referred is not None:
                names.require(referred)
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
    if target.is_method():  # beside its class
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
        self._add(target.imported_by())

    def of(self, target: Target) -> str:
        """Returns the name of a function or class by the imports."""
        return f"{self._modules[target.imported_by().module]}.{target.attribute()}"

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
