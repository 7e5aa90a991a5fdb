"""Follows the references of a checked gin configuration from the entry point, as gin would.

Gin calls `@x/f()` in the scope `x`, and `@f()` in the scope of its binding; the value of a macro is evaluated
in a scope of the macro's name. Bindings of a scope and of the scopes around it apply.
The scope in which code calls a factory is not known; the scope of the factory's binding is assumed.

A factory's caller passes some arguments itself (`self.dense(features=..., name=...)`). These win over gin, so a binding
of one would be ignored. `passed` reads the names of these arguments from the caller's source. A wrapper (model/like.py)
passes on what it is called with, and copies fields of the plain module; `wrapper` reads its call of `like`.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common.ranges import CalledWith
from espalier.launch.config.gin_reader import Bound, Checked, applying, within
from espalier.launch.config.gin_source import Place
from espalier.launch.config.gin_values import declaration, hints
from espalier.model.like import copied, like

# Arguments that other code passes to a factory which its owner only forwards, by owner and parameter. Calls in the
# owner's own source need no row, nor do factories that are declared with CalledWith (espalier/common/ranges.py).
# tests/launch/config/gin_reach_test.py calls each and compares.
PASSED: dict[str, dict[str, tuple[str, ...]]] = {
    "espalier.data.t5.denoising.make_stream": {"stream": ("positions", "task")},
    "espalier.data.text.user_data.register_sources": {"sources": ("name",)},
    "espalier.launch.evaluate.held_out.evaluate": {"stream": ("task",)},
    "espalier.launch.train.train": {
        "checkpointer": ("directory",),
        "eval_stream": ("task",),
        "stream": ("positions",),
    },
    "espalier.trainers.recipe.Recipe": {
        "objective": ("model", "num_sources"),
        "optimizer": ("learning_rate", "param_axes"),
    },
}
# Functions with named slots (**slots), and the arguments that they pass to the factory in each slot.
_SLOTS = {
    "espalier.model.adapters.adapter.named": ("name",),
    "espalier.trainers.hooks.named": ("run",),
    "espalier.trainers.reports.named": ("params",),
}

# Entry functions, with the arguments that their commands always pass from flags.
_OF_EVALUATE = ("checkpoint", "params", "tasks", "max_batches", "json_file")
FLAGS: dict[str, tuple[str, ...]] = {
    "espalier.launch.evaluate.held_out.evaluate": _OF_EVALUATE,
    "espalier.launch.evaluate.ranks.evaluate": ("checkpoint", "params", "json_file", "adapter"),
}


def passed(owner: Any, parameter: str) -> tuple[str, ...]:
    """Returns the arguments with which `owner` calls the factory in `parameter`, sorted by name.

    The calls of a base class count for its subclasses.
    """
    if isinstance(declared := declaration(hints(owner).get(parameter)), CalledWith):
        return tuple(sorted(declared.names))
    for holder in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        name = f"{holder.__module__}.{holder.__qualname__}"
        if name in _SLOTS:
            return _SLOTS[name]
        if names := PASSED.get(name, {}).get(parameter) or _calls(holder).get(parameter):
            return tuple(sorted(names))
    return ()


@functools.cache
def _calls(owner: Any) -> Mapping[str, set[str]]:
    """Returns the keywords of calls of each parameter (for a class: attribute of self) in the source of `owner`."""
    keywords: dict[str, set[str]] = {}
    for node in _call_nodes(owner):
        match node.func:
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if inspect.isclass(owner):
                pass
            case ast.Name(id=name) if not inspect.isclass(owner):
                pass
            case _:
                continue
        keywords.setdefault(name, set()).update(k.arg for k in node.keywords if k.arg)
    return keywords


def _call_nodes(owner: Any) -> list[ast.Call]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError, SyntaxError):  # builtins, and code defined at run time
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A function's call of `like` (model/like.py).

    Attributes:
      plain, made: the function's parameters with the two factories.
      classes: classes of plain modules.
      own: fields of plain modules that are not copied.
      settings: arguments that the call itself passes to `made`.
    """

    plain: str
    made: str
    classes: tuple[type, ...]
    own: tuple[str, ...]
    settings: tuple[str, ...]

    def copied(self, made: Any) -> tuple[str, ...]:
        """Returns the fields that the class `made` gets from plain modules."""
        is_module = dataclasses.is_dataclass(made) and isinstance(made, type)
        return tuple(sorted(copied(self.classes, made, self.own))) if is_module else ()


@functools.cache
def wrapper(owner: Any) -> Wrapper | None:
    """Returns the call of `like` in the source of a function; None without one."""
    names = getattr(owner, "__globals__", {})
    for node in _call_nodes(owner):
        match node:
            case ast.Call(ast.Name(name), [ast.Name(plain), ast.Name(made)]) if (
                names.get(name) is like
            ):
                keywords = {k.arg: k.value for k in node.keywords if k.arg}
                nodes = ast.walk(keywords.pop("of"))
                classes = tuple(names[x.id] for x in nodes if isinstance(x, ast.Name))
                own = ast.literal_eval(keywords.pop("own", ast.Dict([], [])))
                return Wrapper(plain, made, classes, tuple(own), tuple(keywords))
    return None


@dataclasses.dataclass(frozen=True)
class Way:
    """One way in which a function or class is called.

    Attributes:
      scope: the active scope.
      evaluated: whether gin calls it with its bindings alone; else code calls it and passes arguments.
      passed: names of these arguments, as far as they are known.
      owner: the argument that holds the reference; '' for the entry point.
      place: place of the reference.
      result: names of the arguments with which the result is called, if that is known.
      wrapper: the wrapper that passes fields of another module, if this is its `made`.
      copied: names of these fields.
    """

    scope: str
    evaluated: bool
    passed: tuple[str, ...]
    owner: str
    place: Place
    result: tuple[str, ...] = ()
    wrapper: Wrapper | None = None
    copied: tuple[str, ...] = ()


class Reach:
    """The reachable targets by name, with the ways of calling each, and the macros that are read."""

    def __init__(self, checked: Checked, entry_name: str, unread: Sequence[str] = ()):
        """Args:
        checked: the configuration.
        entry_name: full name of the entry point.
        unread: arguments of the entry point that are not followed.
        """
        self.checked = checked
        self._bindings = checked.by_object()
        self.ways: dict[str, list[Way]] = {}
        self.macros: set[str] = set()
        flags = (*FLAGS.get(entry_name, ()), *unread)
        self._waiting = [(entry_name, Way("", True, flags, "", Place("the entry point")))]
        while self._waiting:
            self._visit(*self._waiting.pop())

    def ways_in(self, target: str, scope: str) -> list[Way]:
        """Returns the ways of calling `target` to which a binding in `scope` applies."""
        return [way for way in self.ways.get(target, ()) if within(way.scope, scope)]

    def bound(self, name: str, scope: str) -> dict[str, Bound]:
        """Returns the bindings of the arguments of `name`, called in `scope`; inner scopes win."""
        value = self.checked.targets[name].value
        return applying(scope, self._bindings.get(id(value), ()))

    def _names(self, name: str) -> Sequence[str]:
        """Returns all names under which the files import the object of this name."""
        here = self.checked.targets[name].value
        return [alias for alias, target in self.checked.targets.items() if target.value is here]

    def _visit(self, name: str, way: Way) -> None:
        if way in self.ways.setdefault(name, []):
            return
        names = self._names(name)
        for alias in names:
            self.ways.setdefault(alias, []).append(way)
        target = self.checked.targets[name].value
        if inspect.isclass(target):
            # The methods of a reachable class are reachable too; their arguments are unknown.
            by_class = Way(way.scope, False, (), name, way.place)
            methods = [m for m in self.checked.targets if m.rpartition(".")[0] in names]
            self._waiting += [(method, by_class) for method in methods]
        wraps = wrapper(target) if inspect.isfunction(target) else None
        for argument, bound in self.bound(name, way.scope).items():
            if argument not in (*way.passed, *way.copied):
                code = Way(way.scope, False, (), f"{name}.{argument}", bound.place)
                if wraps is not None and argument == wraps.plain:
                    code = dataclasses.replace(code, passed=way.result)
                elif wraps is not None and argument == wraps.made:
                    arguments = (*way.result, *wraps.settings)
                    code = dataclasses.replace(code, passed=arguments, wrapper=wraps)
                else:
                    code = dataclasses.replace(code, passed=passed(target, argument))
                self._follow(bound, code, ())

    def _follow(self, bound: Bound, code: Way, inside: tuple[str, ...]) -> None:
        """Follows the references in `bound`, an argument's binding or a macro in it.

        Args:
          bound: the binding.
          code: the way of calling references that gin does not call.
          inside: names of the enclosing macros.
        """
        gin_scope = inside[-1] if inside else code.scope
        for reference, target in bound.references:
            if target is None:
                continue
            if reference.evaluate:
                scope = reference.scope or gin_scope
                way = Way(scope, True, (), code.owner, bound.place, result=code.passed)
            else:
                scope = reference.scope or code.scope
                way = dataclasses.replace(code, scope=scope, place=bound.place)
                if code.wrapper is not None:
                    way = dataclasses.replace(way, copied=code.wrapper.copied(target.value))
            self._waiting.append((target.name, way))
        for macro in bound.macros:
            self.macros.add(macro.name)
            if macro.name in self.checked.macros and macro.name not in inside:
                self._follow(self.checked.macros[macro.name], code, (*inside, macro.name))
