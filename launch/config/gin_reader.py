"""Reads a gin configuration against the code it names: imports, bindings, what each refers to.

Follows gin's own order and rules (each file sees only its own imports; later bindings win) but
changes nothing in gin and goes on after a problem.
"""

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gin
from gin import config_parser

from launch.config import gin_source, gin_trust
from launch.config.gin_source import Macro, Place, Problem, Reference


@dataclasses.dataclass(frozen=True)
class Symbol:
    """What an imported name stands for. `value` is None after a failed import."""

    name: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Target:
    """A function or class that gin configures, under its full name."""

    name: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Bound:
    """One binding or macro definition as it stands in the end."""

    value: Any
    place: Place
    references: tuple[tuple[Reference, Target | None], ...]
    macros: tuple[Macro, ...]


@dataclasses.dataclass
class Checked:
    """What was read: final bindings and macros, files in order, imports, and the problems."""

    problems: list[Problem] = dataclasses.field(default_factory=list)
    bindings: dict[tuple[str, str, str], Bound] = dataclasses.field(default_factory=dict)
    targets: dict[str, Target] = dataclasses.field(default_factory=dict)
    macros: dict[str, Bound] = dataclasses.field(default_factory=dict)
    files: list[str] = dataclasses.field(default_factory=list)
    imports: list[config_parser.ImportStatement] = dataclasses.field(default_factory=list)
    warnings: list[Problem] = dataclasses.field(default_factory=list)
    # Names used anywhere, overridden statements included: overriding must not orphan a macro.
    macros_read: dict[str, Place] = dataclasses.field(default_factory=dict)
    scopes_used: set[str] = dataclasses.field(default_factory=set)

    def copy(self) -> "Checked":
        """The bindings and macros as they stand, which more statements do not change."""
        return dataclasses.replace(self, bindings=dict(self.bindings), macros=dict(self.macros))

    def modules_imported_as(self, name: str) -> list[str]:
        """Modules the files import under `name`; several where files differ."""
        return list(dict.fromkeys(bound_module(s) for s in self.imports if s.bound_name() == name))

    def command_line_imports(self) -> list[config_parser.ImportStatement]:
        """The imports of all files together, without names that mean several modules."""
        first = {statement.bound_name(): statement for statement in reversed(self.imports)}
        return [s for name, s in first.items() if len(self.modules_imported_as(name)) == 1]


def bound_module(statement: config_parser.ImportStatement) -> str:
    """The module that the name bound by an import stands for."""
    plain = not statement.is_from and not statement.alias
    return statement.module.split(".")[0] if plain else statement.module


class Reader:
    def __init__(self, search_paths: Sequence[str]):
        self.checked = Checked()
        self.search_paths = search_paths
        # Called after each file, those that are included among them.
        self.after_file: Callable[[], None] = lambda: None
        self.refused: list[Problem] = []  # what untrusted files may not name
        self._trust: gin_trust.Trust | None = None  # of the file that is being read

    def problem(self, place: Place, message: str, remedy: str = "") -> None:
        problem = Problem(place, message, remedy)
        if problem not in self.checked.problems:
            self.checked.problems.append(problem)

    def read_untrusted(self, path: str, own_files: Sequence[str]) -> None:
        """Reads a file that may name only what is harmless, or what `own_files` import."""
        self._trust = gin_trust.trust(path, own_files, self.search_paths)
        self.read_file(path, Place("--gin_file"), ())
        self._trust = None

    def read_file(self, path: str, place: Place, including: tuple[str, ...]) -> None:
        found = gin_source.find(path, self.search_paths)
        if found is None:
            folders = [p or "." for p in gin_source.search_locations(self.search_paths)]
            near = gin_source.similar_files(path, self.search_paths)
            self.problem(
                place,
                f"no file '{path}' (searched {', '.join(folders)})",
                nearest(near) or "Give an absolute path or add a folder: --gin_search_paths.",
            )
            return
        if found in including:
            self.problem(place, f"'{path}' includes itself: {' -> '.join((*including, found))}")
            return
        self.checked.files.append(found)
        try:
            text = gin_source.read(found)
        except (OSError, UnicodeDecodeError) as error:
            self.problem(place, f"'{path}' cannot be read: {gin_source.why_unreadable(error)}")
            return
        self._read(text, path, {}, (*including, found))
        self.after_file()

    def read_bindings(self, bindings: Sequence[str]) -> None:
        symbols = {"gin": Symbol("gin", _GinNames)}
        for statement in self.checked.command_line_imports():
            self._bind_import(statement, symbols)
        for binding in bindings:
            for statement in gin_source.parse(binding, ""):
                place = Place(f"--gin.{binding}")
                if isinstance(statement, Problem):
                    self.problem(place, statement.message, statement.remedy)
                elif isinstance(statement, config_parser.BindingStatement):
                    self._bind(statement, place, symbols)
                else:
                    self.problem(place, "only NAME=VALUE can be given on the command line")

    def _read(self, text: str, name: str, symbols: dict, including: tuple[str, ...]) -> None:
        for statement in gin_source.parse(text, name):
            if isinstance(statement, Problem):
                self.problem(statement.place, statement.message, statement.remedy)
                continue
            location = statement.location
            place = Place(name, location.line_num, location.line_content)
            if isinstance(statement, config_parser.ImportStatement):
                self._import(statement, place, symbols)
            elif isinstance(statement, config_parser.IncludeStatement):
                self.read_file(statement.filename, place, including)
            elif isinstance(statement, config_parser.BlockDeclaration):
                self._resolve(statement.selector, place, symbols)
            else:
                self._bind(statement, place, symbols)

    def _import(self, statement, place: Place, symbols: dict[str, Symbol]) -> None:
        if statement.module.startswith("__gin__"):
            if statement.module != gin_source.DYNAMIC_REGISTRATION:
                self.problem(place, f"gin has no feature '{statement.module}'")
            symbols["gin"] = Symbol("gin", _GinNames)
            return
        if "gin" not in symbols:
            symbols["gin"] = Symbol("gin", _GinNames)  # Say it once per file.
            self.problem(
                place,
                "imports need gin's dynamic registration",
                "Begin the file with: from __gin__ import dynamic_registration",
            )
        refusal = self._trust and self._trust.module_error(statement.module)
        error = None if refusal else _import_error(statement)
        if refusal:
            self.refused.append(Problem(place, *refusal))
        elif error:
            self.problem(place, *error)
        elif statement not in self.checked.imports:
            self.checked.imports.append(statement)
        self._bind_import(statement, symbols, failed=bool(refusal or error))

    def _bind_import(self, statement, symbols: dict[str, Symbol], failed: bool = False) -> None:
        module = bound_module(statement)
        value = None if failed else importlib.import_module(module)
        symbols[statement.bound_name()] = Symbol(module, value)

    def _resolve(self, selector: str, place: Place, symbols) -> Target | None:
        """The object `selector` names, or None after recording what is wrong with it."""
        head, *path = selector.split(".")
        symbol = symbols.get(head)
        if symbol is None:
            near = nearest(difflib.get_close_matches(head, [s for s in symbols if s != "gin"]))
            where = "any file" if place.line == 0 else "this file"
            add = [
                f"from {m.rpartition('.')[0]} import {head}" for m in gin_source.modules_named(head)
            ]
            several = self.checked.modules_imported_as(head)
            if not place.line and len(several) > 1:
                where, near = f"all files alike: {' and '.join(several)}", "Bind it in a file."
            elif add and place.line:
                near = f"Add `{'` or `'.join(add)}`."
            self.problem(place, f"'{head}' is not imported by {where}", near)
            return None
        value, name = symbol.value, symbol.name
        if value is None:
            return None  # The failed import was reported.
        for attribute in path:
            if not hasattr(value, attribute):
                near = difflib.get_close_matches(attribute, _configurable_names(value))
                self.problem(place, f"'{name}' has no '{attribute}'", nearest(near))
                return None
            value, name = getattr(value, attribute), f"{name}.{attribute}"
        if not callable(value):
            self.problem(
                place, f"'{name}' is not a function or class and cannot be configured or referenced"
            )
            return None
        refusal = self._trust and self._trust.object_error(symbol.name, name, value)
        if refusal:
            self.refused.append(Problem(place, *refusal))
            return None
        return self.checked.targets.setdefault(name, Target(name, value))

    def _bind(self, statement, place: Place, symbols) -> None:
        references, macros = [], []
        for leaf in leaves(statement.value):
            if isinstance(leaf, Reference):
                references.append((leaf, self._resolve(leaf.selector, place, symbols)))
                self.checked.scopes_used.update(_prefixes(leaf.scope))
            elif isinstance(leaf, Macro) and not leaf.required:
                macros.append(leaf)
                # Gin evaluates what a macro stands for in a scope of the macro's name.
                self.checked.scopes_used.update(_prefixes(leaf.name))
                self.checked.macros_read.setdefault(leaf.name, place)
        bound = Bound(statement.value, place, tuple(references), tuple(macros))
        if not statement.arg_name:
            scope = f"{statement.scope}/" if statement.scope else ""
            self.checked.macros[scope + statement.selector] = bound
            return
        if (statement.selector, statement.arg_name) == ("gin.macro", "value"):
            self.checked.macros[statement.scope] = bound  # the long form of the same
            return
        target = self._resolve(statement.selector, place, symbols)
        if target is None:
            return
        names = parameter_names(target.value)
        if names is not None and statement.arg_name not in names:
            near = difflib.get_close_matches(statement.arg_name, names)
            known = nearest(near) or f"It has: {', '.join(names) or 'no parameters'}."
            self.problem(place, f"'{target.name}' has no parameter '{statement.arg_name}'", known)
            return
        self.checked.bindings[statement.scope, target.name, statement.arg_name] = bound


def parameter_names(target: Any) -> list[str] | None:
    """Names gin may bind; None where anything goes or nothing can be known."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    # `parent` of a linen module is set by flax.
    return [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in ("parent", "self")
    ]


class _GinNames:
    """What the name `gin` offers inside a gin file."""

    macro = staticmethod(gin.config.macro)
    singleton = staticmethod(gin.config.singleton)


def _import_error(statement) -> tuple[str, str] | None:
    name = statement.module
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not (name == error.name or name.startswith(error.name + ".")):
            return _missing_dependency(name, error.name)
        parent, _, last = name.rpartition(".")
        try:
            package = importlib.import_module(parent) if parent else None
        except ImportError:
            return (f"there is no module '{name}'", "")
        if package is not None and hasattr(package, last):
            module, base = parent.rpartition(".")[::2]
            source = f"from {module} import {base}" if module else f"import {parent}"
            return (
                f"'{last}' is not a module; gin imports modules only",
                f"Write `{source}` and name it {base or parent}.{last}.",
            )
        siblings = [m.name for m in pkgutil.iter_modules(getattr(package, "__path__", None))]
        near = difflib.get_close_matches(last, siblings)
        return (f"there is no module '{name}'", nearest(near))
    except Exception as error:  # noqa: BLE001 (whatever a module raises is reported as its problem)
        return (f"importing '{name}' failed: {type(error).__name__}: {error}", "")
    return None


def _missing_dependency(name: str, missing: str) -> tuple[str, str]:
    top = missing.split(".")[0]
    if top == name.split(".")[0]:
        return (f"'{name}' imports '{missing}', which does not exist", "")
    text = f"'{name}' needs the package '{top}', which is not installed"
    return (text, "Install it, or the extra of this project that brings it (see setup.py).")


def _configurable_names(value: Any) -> list[str]:
    return [n for n in dir(value) if not n.startswith("_") and callable(getattr(value, n, None))]


def leaves(value: Any) -> Iterable[Any]:
    """The literals, references and macros that a value is made of."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(key)
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def is_required(value: Any) -> bool:
    """Whether the user still has to give the value or a part of it."""
    return any(isinstance(leaf, Macro) and leaf.required for leaf in leaves(value))


def _prefixes(scope: str) -> list[str]:
    parts = scope.split("/") if scope else []
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def nearest(names: Sequence[str]) -> str:
    return f"Nearest: {', '.join(names)}." if names else ""
