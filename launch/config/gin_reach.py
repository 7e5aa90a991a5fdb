"""Follows the references of a checked gin configuration from the entry point, as gin would.

Gin calls `@x/f()` in the scope `x`, and `@f()` in the scope of what it is bound to; what a macro stands
for is evaluated in a scope of the macro's name. Bindings of a scope and of those around it apply.
Where code calls a factory without a scope of its own cannot be known; it is taken to be where the
factory was bound.
"""

import dataclasses
import inspect
from collections.abc import Sequence

from launch.config import gin_seams
from launch.config.gin_reader import Bound, Checked
from launch.config.gin_source import Place


@dataclasses.dataclass(frozen=True)
class Way:
    """One way in which something comes to be called.

    Attributes:
      scope: that is active then.
      evaluated: gin calls it with its bindings alone; else code does, with arguments of its own.
      passed: names of those arguments, as far as they are known.
      owner: the argument that holds the reference; '' for the entry point.
      place: of the reference.
    """

    scope: str
    evaluated: bool
    passed: tuple[str, ...]
    owner: str
    place: Place


class Reach:
    """What is reached: targets by name with the ways to them, and the macros that are read."""

    def __init__(self, checked: Checked, entry_name: str):
        self.checked = checked
        self.ways: dict[str, list[Way]] = {}
        self.macros: set[str] = set()
        self._waiting: list[tuple[str, Way]] = []
        flags = gin_seams.FLAGS.get(entry_name, ())
        self._waiting.append((entry_name, Way("", True, flags, "", Place("the entry point"))))
        while self._waiting:
            self._visit(*self._waiting.pop())

    def ways_in(self, target: str, scope: str) -> list[Way]:
        """The ways to `target` for which a binding in `scope` applies."""
        return [way for way in self.ways.get(target, ()) if _within(way.scope, scope)]

    def bound(self, name: str, scope: str) -> dict[str, Bound]:
        """What gin binds to the arguments of `name`, called in `scope`; inner scopes win."""
        names = self._names(name)
        found = [
            (key_scope.count("/") + bool(key_scope), argument, bound)
            for (key_scope, target, argument), bound in self.checked.bindings.items()
            if target in names and _within(scope, key_scope)
        ]
        return {argument: bound for _, argument, bound in sorted(found, key=lambda item: item[0])}

    def _names(self, name: str) -> Sequence[str]:
        """All names under which the files know the object of this name."""
        here = self.checked.targets[name].value
        return [other for other, target in self.checked.targets.items() if target.value is here]

    def _visit(self, name: str, way: Way) -> None:
        if way in self.ways.setdefault(name, []):
            return
        names = self._names(name)
        for other in names:
            self.ways.setdefault(other, []).append(way)
        target = self.checked.targets[name].value
        if inspect.isclass(target):
            # A class brings its methods, which are called with who knows what.
            brought = Way(way.scope, False, (), name, way.place)
            for other in self.checked.targets:
                if other.rpartition(".")[0] in names:
                    self._waiting.append((other, brought))
        for argument, bound in self.bound(name, way.scope).items():
            if argument not in way.passed:
                code = Way(
                    scope=way.scope,
                    evaluated=False,
                    passed=gin_seams.passed(target, argument),
                    owner=f"{name}.{argument}",
                    place=bound.place,
                )
                self._follow(bound, code, ())

    def _follow(self, bound: Bound, code: Way, inside: tuple[str, ...]) -> None:
        """Follows what an argument holds: `code` is how it is called if gin does not call it.

        Args:
          bound: the argument's binding, or a macro in it.
          code: the way to what is referenced without being called.
          inside: names of the macros around.
        """
        gin_scope = inside[-1] if inside else code.scope
        for reference, target in bound.references:
            if target is None:
                continue
            if reference.evaluate:
                way = Way(reference.scope or gin_scope, True, (), code.owner, bound.place)
            else:
                way = dataclasses.replace(
                    code, scope=reference.scope or code.scope, place=bound.place
                )
            self._waiting.append((target.name, way))
        for macro in bound.macros:
            self.macros.add(macro.name)
            if macro.name in self.checked.macros and macro.name not in inside:
                self._follow(self.checked.macros[macro.name], code, (*inside, macro.name))


def _within(scope: str, outer: str) -> bool:
    return not outer or f"{scope}/".startswith(f"{outer}/")
