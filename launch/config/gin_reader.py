"""Reads a gin configuration against the code it names: imports, bindings, and their references.

Follows gin's own order and rules (each file sees only its own imports; later bindings win), and continues after a problem.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import os
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gin
from gin import config_parser

from espalier.launch.config import gin_source, model_file
from espalier.launch.config.parameters import parameter_names
from espalier.launch.config.values import Macro, Place, Problem, Reference, leaves, mapped, scoped
from espalier.launch.environment import EARLIER_PACKAGES


@dataclasses.dataclass(frozen=True)
class Target:
    """A function, class or module under a full name: of several names that files have for it, the first.

    Attributes:
      name: the full name.
      value: the object; None for a module whose import failed.
      source: the import statement and the names, from that of the module on, by which a file has named it first.
    """

    name: str
    value: Any
    source: tuple[config_parser.ImportStatement, tuple[str, ...]] | None = dataclasses.field(
        default=None, compare=False
    )

    @functools.cached_property
    def home(self) -> tuple[config_parser.ImportStatement, str]:
        """The statement that imports it, without submodules that are not on the way to it, and its name in that module."""
        if self.source is None:
            module = self.value.__module__
            place = config_parser.Location(None, 0, None, "")
            statement = config_parser.ImportStatement(module, "." in module, None, place)
            return statement, self.value.__qualname__
        statement, names = self.source
        if statement.is_from or statement.alias:
            return statement, ".".join(names[1:])
        pairs = zip(statement.module.split("."), names[:-1], strict=False)
        way = [part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        return statement._replace(module=".".join(way)), ".".join(names[len(way) :])

    @property
    def is_method(self) -> bool:
        """Whether it is a function of a class."""
        last = self.home[1].split(".")[-2:]
        names = getattr(self.value, "__qualname__", "").split(".")
        return inspect.isfunction(self.value) and len(last) == 2 and names[-2:] == last

    def path(self) -> str:
        """Returns the name by which gin orders it: with the alias of its module, if it has one."""
        if self.source is None:
            return self.name
        statement, names = self.source
        return ".".join([statement.partial_path(), *names[1:]])


@dataclasses.dataclass(frozen=True)
class Bound:
    """One binding or macro definition.

    Attributes:
      value: a literal, reference or macro, or a container of them. A reference to what does not exist has no target.
      place: place of the statement.
      file: real path of the file; '' for the command line.
    """

    value: Any
    place: Place
    file: str = ""

    @functools.cached_property
    def references(self) -> tuple[Reference, ...]:
        """The references in the value that have a target."""
        references = (leaf for leaf in leaves(self.value) if isinstance(leaf, Reference))
        return tuple(reference for reference in references if reference.target is not None)

    @functools.cached_property
    def macros(self) -> tuple[str, ...]:
        """The names of the macros in the value."""
        macros = (leaf for leaf in leaves(self.value) if isinstance(leaf, Macro))
        return tuple(macro.name for macro in macros if not macro.required)

    def meaning(self) -> str:
        """Returns the value as text with full names, which does not depend on the imports."""
        return repr(self.named(lambda target: target.name))

    def named(self, name: Callable[[Target], str]) -> Any:
        """Returns the value with other names in its references."""

        def renamed(leaf: Any) -> Any:
            known = isinstance(leaf, Reference) and leaf.target is not None
            return leaf.renamed(name(leaf.target)) if known else leaf

        return mapped(self.value, renamed)


@dataclasses.dataclass
class Checked:
    """The final bindings and macros of a configuration, and everything else that was read.

    Attributes:
      problems, warnings: in reading order.
      bindings: final bindings by (scope, full name of the target, argument).
      targets: by full name; one for all names of an object.
      macros: final definitions by name.
      files, imports: in reading order.
      history: all bindings and definitions of a key in reading order; the key of a macro is its name.
      includes: files included by each file, directly or not; real paths.
      replaces: each file's list REPLACES.
      macros_read: where each macro is first read, also in overridden statements.
      scopes_used: all scopes that references and macros enter.
    """

    problems: list[Problem] = dataclasses.field(default_factory=list)
    bindings: dict[tuple[str, str, str], Bound] = dataclasses.field(default_factory=dict)
    targets: dict[str, Target] = dataclasses.field(default_factory=dict)
    macros: dict[str, Bound] = dataclasses.field(default_factory=dict)
    files: list[str] = dataclasses.field(default_factory=list)
    imports: list[config_parser.ImportStatement] = dataclasses.field(default_factory=list)
    warnings: list[Problem] = dataclasses.field(default_factory=list)
    history: dict[Any, list[Bound]] = dataclasses.field(default_factory=dict)
    includes: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    replaces: dict[str, Bound] = dataclasses.field(default_factory=dict)
    macros_read: dict[str, Place] = dataclasses.field(default_factory=dict)
    scopes_used: set[str] = dataclasses.field(default_factory=set)

    def all_macros(self) -> dict[str, Bound]:
        """Returns all definitions by name, with the last list REPLACES."""
        macros = dict(self.macros)
        for listed in self.replaces.values():
            macros[REPLACES] = listed
        return macros

    def by_target(self) -> dict[str, list[tuple[str, str, Bound]]]:
        """Returns (scope, argument, binding) by the name of the function or class."""
        bindings: dict[str, list[tuple[str, str, Bound]]] = {}
        for (scope, name, argument), bound in self.bindings.items():
            bindings.setdefault(name, []).append((scope, argument, bound))
        return bindings

    def target(self, name: str, value: Any, source: Any = None) -> Target:
        """Returns the target of an object, of which this is a full name; for `source` see `Target`."""
        if name not in self.targets:
            known = (target for target in self.targets.values() if target.value is value)
            self.targets[name] = next(known, None) or Target(name, value, source)
        return self.targets[name]

    def copy(self) -> "Checked":
        """Returns a copy that later statements do not change."""
        return dataclasses.replace(self, bindings=dict(self.bindings), macros=dict(self.macros))

    def modules_imported_as(self, name: str) -> list[str]:
        """Returns the modules that the files import under `name`; several where files differ."""
        return list(
            dict.fromkeys(
                gin_source.bound_module(s) for s in self.imports if s.bound_name() == name
            )
        )

    def command_line_imports(self) -> list[config_parser.ImportStatement]:
        """Returns the imports of all files, except names with several modules."""
        first = {statement.bound_name(): statement for statement in reversed(self.imports)}
        return [s for name, s in first.items() if len(self.modules_imported_as(name)) == 1]


# A list in a method's file with the files of other methods whose bindings it may replace; see gin_reach.py.
REPLACES = "REPLACES"
_LONG_MACRO = ("gin.macro", "value")  # `NAME/gin.macro.value = 1` is `NAME = 1`


class _GinNames:
    """The attributes of the name `gin` in a gin file."""

    macro = staticmethod(gin.config.macro)
    singleton = staticmethod(gin.config.singleton)


_GIN = Target("gin", _GinNames)


_FLAG = Place("--gin_file")


class Reader:
    """Reads files and bindings into `checked`.

    Attributes:
      after_file: called with the real path of each file after reading it.
      refused: the problem of a model.json that was not read, because it names code that may run anything.
    """

    def __init__(self, search_paths: Sequence[str] = (), own_modules: Iterable[str] = ()):
        """Args:
        search_paths: more folders in which relative files are looked for.
        own_modules: modules outside of this project that a model.json may use.
        """
        self.checked = Checked()
        self.after_file: Callable[[str], None] = lambda file: None
        self.refused: Problem | None = None
        self._search_paths = search_paths
        self._own_modules = frozenset(own_modules)
        self._file = ""  # real path of the current file

    def problem(self, place: Place, message: str, remedy: str = "") -> None:
        problem = Problem(place, message, remedy)
        if problem not in self.checked.problems:
            self.checked.problems.append(problem)

    def read_file(self, path: str, place: Place = _FLAG, including: tuple[str, ...] = ()) -> None:
        file = gin_source.find(path, self._search_paths)
        if file is None:
            folders = [p or "." for p in gin_source.search_locations(self._search_paths)]
            near = gin_source.similar_files(path, self._search_paths)
            self.problem(
                place,
                f"no file '{path}' (searched {', '.join(folders)})",
                listed(near) or "Give an absolute path or add a folder: --gin_search_paths.",
            )
            return
        if file in including:
            self.problem(place, f"'{path}' includes itself: {' -> '.join((*including, file))}")
            return
        self.checked.files.append(file)
        try:
            if model_file.is_model_file(file):
                record = model_file.read(file)
                self._check_foreign(file, record.foreign)
                text = record.gin()
            else:
                text = gin_source.read(file)
        except (OSError, UnicodeDecodeError, model_file.ModelFileError) as error:
            self.problem(place, f"'{path}' cannot be read: {gin_source.why_unreadable(error)}")
            return
        if self.refused:
            return
        outer, self._file = self._file, os.path.realpath(file)
        for outer_file in map(os.path.realpath, including):
            self.checked.includes.setdefault(outer_file, set()).add(self._file)
        self._read(text, path, {}, (*including, file))
        self.after_file(self._file)
        self._file = outer

    def _check_foreign(self, file: str, names: Iterable[tuple[str, str]]) -> None:
        """Sets `refused` if a model.json uses a module which the user's own files do not import."""
        for module, attribute in names:
            defined = None
            if module in self._own_modules:
                value = getattr(importlib.import_module(module), attribute, None)
                defined = getattr(value, "__module__", None)
            if defined != module:  # also of what the module only imports, such as a function of os
                self.refused = Problem(
                    Place(file),
                    f"the model uses '{module}.{attribute}', which is not of this project: reading it could run anything",
                    f"If you know the code, import {module} in a gin file of your own that you give too.",
                )

    def read_bindings(self, bindings: Sequence[str]) -> None:
        symbols = {"gin": _GIN}
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
                    self.problem(place, "only NAME=VALUE can be set on the command line")

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

    def _import(self, statement, place: Place, symbols: dict[str, Target]) -> None:
        if statement.module.startswith("__gin__"):
            if statement.module != gin_source.DYNAMIC_REGISTRATION:
                self.problem(place, f"gin has no feature '{statement.module}'")
            symbols["gin"] = _GIN
            return
        if "gin" not in symbols:
            symbols["gin"] = _GIN  # reported once per file
            self.problem(
                place,
                "imports need gin's dynamic registration",
                "Begin the file with: from __gin__ import dynamic_registration",
            )
        error = _import_error(statement)
        if error:
            self.problem(place, *error)
        elif statement not in self.checked.imports:
            self.checked.imports.append(statement)
        self._bind_import(statement, symbols, failed=bool(error))

    def _bind_import(self, statement, symbols: dict[str, Target], failed: bool = False) -> None:
        module = gin_source.bound_module(statement)
        value = None if failed else importlib.import_module(module)
        name = statement.bound_name()
        symbols[name] = Target(module, value, (statement, (name,)))

    def _resolve(self, selector: str, place: Place, symbols) -> Target | None:
        """Returns the object that `selector` names, or None after recording the problem."""
        head, *path = selector.split(".")
        symbol = symbols.get(head)
        if symbol is None:
            self._not_imported(head, place, symbols)
            return None
        value, name = symbol.value, symbol.name
        source = symbol.source and (symbol.source[0], (head, *path))
        if value is None:
            return None  # The failed import was reported.
        for attribute in path:
            if not hasattr(value, attribute):
                names = [n for n in dir(value) if n[0] != "_" and callable(getattr(value, n, None))]
                self.problem(place, f"'{name}' has no '{attribute}'", nearest(attribute, names))
                return None
            value, name = getattr(value, attribute), f"{name}.{attribute}"
        if not callable(value):
            self.problem(
                place, f"'{name}' is not a function or class and cannot be configured or referenced"
            )
            return None
        return self.checked.target(name, value, source)

    def _not_imported(self, name: str, place: Place, symbols) -> None:
        near = nearest(name, [s for s in symbols if s != "gin"])
        where = "this file" if place.line else "any file"
        modules = gin_source.modules_named(name) if place.line else ()
        several = self.checked.modules_imported_as(name)
        if not place.line and len(several) > 1:
            where, near = f"all files alike: {' and '.join(several)}", "Bind it in a file."
        elif modules:
            add = [f"from {module.rpartition('.')[0]} import {name}" for module in modules]
            near = f"Add `{'` or `'.join(add)}`."
        self.problem(place, f"'{name}' is not imported by {where}", near)

    def _bind(self, statement, place: Place, symbols) -> None:
        def resolved(leaf: Any) -> Any:
            if not isinstance(leaf, Reference):
                return leaf
            self.checked.scopes_used.update(prefixes(leaf.scope))
            return dataclasses.replace(leaf, target=self._resolve(leaf.selector, place, symbols))

        bound = Bound(mapped(statement.value, resolved), place, self._file)
        for macro in bound.macros:
            # The value of a macro is evaluated in a scope of the macro's name.
            self.checked.scopes_used.update(prefixes(macro))
            self.checked.macros_read.setdefault(macro, place)
        if (statement.selector, statement.arg_name) == (REPLACES, ""):
            self.checked.replaces.pop(self._file, None)  # so that the last one is last
            self.checked.replaces[self._file] = bound
            return
        if not statement.arg_name or (statement.selector, statement.arg_name) == _LONG_MACRO:
            named_by_scope = bool(statement.arg_name)
            name = (
                statement.scope if named_by_scope else scoped(statement.scope, statement.selector)
            )
            self.checked.macros[name] = bound
            self.checked.history.setdefault(name, []).append(bound)
            return
        target = self._resolve(statement.selector, place, symbols)
        if target is None:
            return
        names = parameter_names(target.value)
        if names is not None and statement.arg_name not in names:
            hint = nearest(statement.arg_name, names)
            hint = hint or f"It has: {', '.join(names) or 'no parameters'}."
            self.problem(place, f"'{target.name}' has no parameter '{statement.arg_name}'", hint)
            return
        key = (statement.scope, target.name, statement.arg_name)
        if names is None and not self._file and bound.value is None:
            self._check_slot(key, place)
        self.checked.bindings[key] = bound
        self.checked.history.setdefault(key, []).append(bound)

    def _check_slot(self, key: tuple[str, str, str], place: Place) -> None:
        """Checks that a slot set to None on the command line is one that a file fills."""
        scope, target, argument = key
        slots = [name for s, t, name in self.checked.bindings if (s, t) == (scope, target)]
        if argument not in slots:
            near = nearest(argument, slots)
            hint = f"Filled are: {', '.join(slots)}." if slots else "No slot is filled."
            message = f"'{target}.{argument}' has no effect: no file fills this slot"
            self.problem(place, message, near or hint)


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
        return (f"there is no module '{name}'", nearest(last, siblings))
    except Exception as error:  # noqa: BLE001 (whatever a module raises is reported as its problem)
        return (f"importing '{name}' failed: {type(error).__name__}: {error}", "")
    return None


def _missing_dependency(name: str, missing: str) -> tuple[str, str]:
    top = missing.split(".")[0]
    if top in EARLIER_PACKAGES:
        return (
            f"'{name}' imports '{missing}'",
            f"Import espalier.{missing}: it has this name now.",
        )
    if top == name.split(".")[0]:
        return (f"'{name}' imports '{missing}', which does not exist", "")
    text = f"'{name}' needs the package '{top}', which is not installed"
    return (text, "Install it, or this project's extra with it (see setup.py).")


def is_required(value: Any) -> bool:
    """Returns whether the value contains gin's REQUIRED, so that the user must set it."""
    return any(isinstance(leaf, Macro) and leaf.required for leaf in leaves(value))


def final_bound(bound: Bound, macros: Mapping[str, Bound], depth: int = 20) -> Bound:
    """Returns `bound`; if its value is a macro, that macro's final definition."""
    while isinstance(bound.value, Macro) and bound.value.name in macros and depth:
        bound, depth = macros[bound.value.name], depth - 1
    return bound


def applying(scope: str, bindings: Iterable[tuple[str, str, Bound]]) -> dict[str, Bound]:
    """Returns, by argument, the bindings that apply in `scope`; inner scopes win.

    Args:
      scope: a scope, '' for none.
      bindings: (scope, argument, binding) of one target.
    """
    outer = [binding for binding in bindings if within(scope, binding[0])]
    outer.sort(key=lambda binding: len(binding[0]))
    return {argument: bound for _, argument, bound in outer}


def within(scope: str, outer: str) -> bool:
    """Returns whether bindings of the scope `outer` apply in `scope`."""
    return not outer or f"{scope}/".startswith(f"{outer}/")


def prefixes(scope: str) -> list[str]:
    """Returns a scope and the scopes around it, outer ones first; [] for no scope."""
    return list(itertools.accumulate(scope.split("/"), "{}/{}".format)) if scope else []


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns a remedy with the names that are close to a wrong name; '' if none is."""
    return listed(difflib.get_close_matches(name, list(names)))


def listed(near: Sequence[str]) -> str:
    """Returns a remedy with the names that may be meant; '' without any."""
    return f"Nearest: {', '.join(near)}." if near else ""
