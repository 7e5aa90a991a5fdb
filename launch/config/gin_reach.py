"""What a checked gin configuration reaches from its entry point, and whether the methods in it go together.

References are followed as gin would. Gin calls `@x/f()` in the scope `x`, and `@f()` in the scope of its binding; the value of a
macro is evaluated in a scope of the macro's name. Bindings of a scope and of the scopes around it apply.
The scope in which code calls a factory is not known; the scope of the factory's binding is assumed.

The gin files of methods (below a folder `methods`) may not silently replace each other's bindings, because the methods of one run
must combine. A method's file may change the bindings of a file that it includes or that it names in its list REPLACES. The
user's own files and the command line may change any binding.

All other files refine those of models, data and runs, and each file refines what it includes. A value that is set before the file
that gives its default would be lost.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

from espalier.launch import environment
from espalier.launch.config import gin_source, model_file
from espalier.launch.config.gin_reader import (
    REPLACES,
    Bound,
    Checked,
    Target,
    applying,
    is_required,
    within,
)
from espalier.launch.config.parameters import Wrapper, passed, wrapper
from espalier.launch.config.values import Place, Problem, leaves, scoped

_CONFIGS = os.path.join(os.path.realpath(environment.ROOT), "t5x_configs", "")
_BASE = ("models", "data", "runs")  # folders
# Entry functions, with the arguments that their commands always pass from flags.
_OF_EVALUATE = ("checkpoint", "params", "tasks", "max_batches", "json")
FLAGS: dict[str, tuple[str, ...]] = {
    "espalier.launch.evaluate.held_out.evaluate": _OF_EVALUATE,
    "espalier.launch.evaluate.ranks.evaluate": ("checkpoint", "params", "json", "adapter"),
}


def unread_stream(file: str, target: str, entry_name: str, reached: Collection[str]) -> bool:
    """Returns whether a shipped file of data binds a stream that an evaluation does not read, which is no mistake.

    An evaluation trains on no stream; one that reads no held-out stream either has its own way to the tasks.
    """
    name = target.rpartition(".")[2]
    held_out = any(other.endswith(".make_eval_stream") for other in reached)
    unread = name == "make_stream" or (name == "make_eval_stream" and not held_out)
    return unread and entry_name in FLAGS and "/t5x_configs/data/" in file


@dataclasses.dataclass(frozen=True)
class Way:
    """One way in which a function or class is called.

    Attributes:
      target: the function or class.
      scope: the active scope.
      evaluated: whether gin calls it with its bindings alone; else code calls it and passes arguments.
      passed: names of these arguments, as far as they are known.
      owner: the argument that holds the reference; '' for the entry point.
      place: place of the reference.
      result: names of the arguments with which the result is called, if that is known.
      wrapper: the wrapper that passes fields of another module, if this is its `made`.
      copied: names of these fields.
    """

    target: Target = dataclasses.field(compare=False)
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
        self._bindings = checked.by_target()
        self.ways: dict[str, list[Way]] = {}
        self.macros: set[str] = set()
        flags = (*FLAGS.get(entry_name, ()), *unread)
        entry = checked.targets[entry_name]
        self._waiting = [Way(entry, "", True, flags, "", Place("the entry point"))]
        while self._waiting:
            self._visit(self._waiting.pop())

    def ways_in(self, target: str, scope: str) -> list[Way]:
        """Returns the ways of calling `target` to which a binding in `scope` applies."""
        return [way for way in self.ways.get(target, ()) if within(way.scope, scope)]

    def bound(self, way: Way) -> dict[str, Bound]:
        """Returns the bindings that apply to a call; inner scopes win."""
        return applying(way.scope, self._bindings.get(way.target.name, ()))

    def _visit(self, way: Way) -> None:
        target, name = way.target.value, way.target.name
        ways = self.ways.setdefault(name, [])
        if way in ways:
            return
        ways.append(way)
        if inspect.isclass(target):
            # The methods of a reachable class are reachable too; their arguments are unknown.
            for alias, method in self.checked.targets.items():
                if self.checked.targets.get(alias.rpartition(".")[0]) is way.target:
                    self._waiting.append(Way(method, way.scope, False, (), name, way.place))
        wraps = wrapper(target) if inspect.isfunction(target) else None
        for argument, bound in self.bound(way).items():
            if argument not in (*way.passed, *way.copied):
                code = Way(way.target, way.scope, False, (), f"{name}.{argument}", bound.place)
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
          code: the way of calling references that gin does not call; their target is the argument's.
          inside: names of the enclosing macros.
        """
        for reference in bound.references:
            target, place = reference.target, bound.place
            if reference.evaluate:
                scope = reference.scope or (inside[-1] if inside else code.scope)
                way = Way(target, scope, True, (), code.owner, place, result=code.passed)
            else:
                scope = reference.scope or code.scope
                copied = code.wrapper.copied(target.value) if code.wrapper else ()
                way = dataclasses.replace(
                    code, target=target, scope=scope, place=place, copied=copied
                )
            self._waiting.append(way)
        for macro in bound.macros:
            self.macros.add(macro)
            if macro in self.checked.macros and macro not in inside:
                self._follow(self.checked.macros[macro], code, (*inside, macro))


def is_method(file: str) -> bool:
    """Returns whether a file is a method's."""
    return "/methods/" in file


def conflicts(checked: Checked) -> list[Problem]:
    """Returns a problem for each pair of method files where the later replaces values of the earlier."""
    pairs: dict[tuple[str, str], list[tuple[str, Bound, Bound]]] = {}
    for key, history in checked.history.items():
        if (earlier := _replaced(checked, key, history)) is not None:
            files = (earlier.file, history[-1].file)
            pairs.setdefault(files, []).append((_name(key), earlier, history[-1]))
    problems = []
    for (name, earlier, later), *more in pairs.values():
        also = f" (and {', '.join(name for name, _, _ in more)})" if more else ""
        text = f"replaces '{name}' of another method{also}, which is {earlier.value!r} at {earlier.place}"
        remedy = (
            f"Use one of the two files, or choose: --gin.{name}=VALUE. A file that refines another "
            f"includes it, or names what it replaces: {REPLACES} = ['{name}']."
        )
        problems.append(Problem(later.place, text, remedy))
    return problems


def set_too_early(checked: Checked) -> list[Problem]:
    """Returns a problem for each file and later file, which resets values of the first that were set before their defaults were read."""
    pairs: dict[tuple[str, str], list[tuple[Any, Bound, Bound]]] = {}
    for key, (*before, last) in checked.history.items():
        for bound in before:
            included = last.file in checked.includes.get(bound.file, ())
            includes = bound.file in checked.includes.get(last.file, ())
            is_first = bound is before[0] and _is_base(last) > (_is_base(bound) or includes)
            differs = bound.meaning() != last.meaning() and not is_required(last.value)
            if (included or is_first) and differs and not is_required(bound.value):
                pairs.setdefault((bound.file, last.file), []).append((key, bound, last))
                break
    problems = []
    for (key, earlier, last), *more in pairs.values():
        also = f" (and {', '.join(_name(key) for key, _, _ in more)})" if more else ""
        text = f"'{_name(key)}' has no effect{also}: {last.place}, which is read later, sets it to {last.value!r}"
        remedy = "Set it after that file: below its include, or in a --gin_file after it."
        problems.append(Problem(earlier.place, text, remedy))
    return problems


def _is_base(bound: Bound) -> bool:
    """Returns whether a binding is in a file of models, data or runs, or in a run's record."""
    folder = bound.file.removeprefix(_CONFIGS).partition("/")[0]
    name = os.path.basename(bound.file)
    return folder in _BASE or name in (gin_source.RUN_CONFIG, model_file.NAME)


def _replaced(checked: Checked, key: Any, history: Sequence[Bound]) -> Bound | None:
    """Returns the binding of another method that a key's last binding may not replace, or None."""
    last = history[-1]
    allowed = {last.file, *checked.includes.get(last.file, ())}
    names = leaves(checked.replaces[last.file].value) if last.file in checked.replaces else ()
    if not is_method(last.file) or any(_name(key).endswith(str(name)) for name in names):
        return None
    for earlier in reversed(history[:-1]):
        if not is_method(earlier.file):  # the user already replaced the method's binding
            return None
        differs = earlier.meaning() != last.meaning() and not is_required(earlier.value)
        if differs and earlier.file not in allowed:
            return earlier
    return None


def without_effect(
    checked: Checked, reach: Reach, so_far: Sequence[tuple[str, Callable[[], Reach]]]
) -> list[Problem]:
    """Returns a problem for each method's file without any effect, unless the user's own bindings replaced its effect.

    Args:
      checked, reach: the whole configuration and its reach.
      so_far: each file in reading order, with the reach of the configuration up to it.
    """
    problems = []
    for file, (place, own) in _bound_alone(checked).items():
        if _effective(reach, own):
            continue
        files = [name for name, _ in so_far]
        effective = [
            i for i in range(files.index(file), len(files)) if _effective(so_far[i][1](), own)
        ]
        if not effective:
            text = "has no effect: this run uses nothing that only this file binds"
            remedy = "It is for another kind of run or model, or another method replaces it."
            problems.append(Problem(place, text, remedy))
            continue
        undone_by = [*files, ""][effective[-1] + 1]
        refined = file in checked.includes.get(undone_by, ()) or undone_by in checked.replaces
        if is_method(undone_by) and not refined:
            text = f"has no effect: {undone_by} replaces everything that it binds"
            problems.append(Problem(place, text, "Use one of the two."))
    return problems


def _bound_alone(checked: Checked) -> dict[str, tuple[Place, list[tuple[Any, Bound]]]]:
    """Returns, for each method's file, its place and the bindings that no unrelated method has too.

    A file that another method includes belongs to that method.
    """
    parts = {part for file, files in checked.includes.items() if is_method(file) for part in files}
    own: dict[str, tuple[Place, list[tuple[Any, Bound]]]] = {}
    for key, history in checked.history.items():
        bounds = [bound for bound in history if is_method(bound.file)]
        for bound in (bound for bound in bounds if bound.file not in parts):
            related = {bound.file, *checked.includes.get(bound.file, ())}
            shared = any(
                again.file not in related
                and bound.file not in checked.includes.get(again.file, ())
                and again.meaning() == bound.meaning()
                for again in bounds
            )
            _, alone = own.setdefault(bound.file, (Place(bound.place.source), []))
            if not shared:
                alone.append((key, bound))
    return own


def _effective(reach: Reach, bounds: Sequence[tuple[Any, Bound]]) -> bool:
    """Returns whether any of these bindings and macros is final and used."""
    for key, bound in bounds:
        is_macro = isinstance(key, str)
        current = (reach.checked.macros if is_macro else reach.checked.bindings).get(key)
        used = key in reach.macros if is_macro else reach.ways_in(key[1], key[0])
        if used and current is not None and current.meaning() == bound.meaning():
            return True
    return False


def _name(key: Any) -> str:
    """Returns a short text for a key: a macro, or 'scope/module.Class.argument'."""
    if isinstance(key, str):
        return key
    scope, target, argument = key
    return scoped(scope, ".".join([*target.split(".")[-2:], argument]))
