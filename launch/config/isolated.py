"""Evaluates a checked gin configuration without gin, separately from the configuration of this process.

Gin has one configuration per process, and every scope inherits the bindings without a scope. If another run's model were
read into a scope, it would inherit this run's bindings for every argument that its own file does not bind: a dense
teacher would get the student's factors.

The rules are gin's: bindings of the current scope and of the scopes around it apply, inner ones win; `@x/f` is called in
the scope `x`; the value of `%NAME` is evaluated in the scope `NAME`; a caller's arguments win over bindings.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Collection, Iterator
from typing import Any

import gin

from launch.config.gin_reader import Bound, Checked, Target, applying
from launch.config.gin_source import Macro, Reference

# A context variable, because factories are called while a step is traced, possibly in another thread.
_SCOPE: contextvars.ContextVar[str] = contextvars.ContextVar("isolated_scope", default="")


class Isolated:
    """The values of a configuration that was read without problems."""

    def __init__(self, checked: Checked):
        self._macros = checked.macros
        self._singletons: dict[str, Any] = {}
        self._bindings: dict[int, list[tuple[str, str, Bound]]] = {}
        for (scope, target, argument), bound in checked.bindings.items():
            key = id(checked.targets[target].value)  # files may know one object under several names
            self._bindings.setdefault(key, []).append((scope, argument, bound))

    def macro(self, name: str) -> Any:
        """Returns the value of the macro `name`.

        Raises:
          ValueError: the macro has no value.
        """
        if name not in self._macros:
            raise ValueError(f"macro '{name}' has no value")
        with _scope(name):
            bound = self._macros[name]
            return self._value(bound.value, bound)

    def call(self, target: Target, scope: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or class with its bindings in `scope`, or in the current scope if `scope` is empty."""
        with _scope(scope or _SCOPE.get()):
            if target.value is gin.config.macro:
                return self.macro(_SCOPE.get())
            names = list(inspect.signature(target.value).parameters) if args else []
            values = self.values(target, _SCOPE.get(), passed={*kwargs, *names[: len(args)]})
            if target.value is gin.config.singleton:
                if _SCOPE.get() not in self._singletons:
                    self._singletons[_SCOPE.get()] = values["constructor"]()
                return self._singletons[_SCOPE.get()]
            return target.value(*args, **values, **kwargs)

    def values(self, target: Target, scope: str, *, passed: Collection[str] = ()) -> dict[str, Any]:
        """Returns the arguments that a function or class has in `scope`, without those that a caller has passed."""
        with _scope(scope):
            return {
                argument: self._value(bound.value, bound)
                for argument, bound in self._bound(target, scope).items()
                if argument not in passed
            }

    def describe(self, target: Target, scope: str) -> str:
        """Returns `name(argument=value, ...)` with all bindings of a call; the same text in every process."""
        scope = scope or _SCOPE.get()
        with _scope(scope):
            bindings = sorted(self._bound(target, scope).items())
            parts = [f"{name}={self._text(bound.value, bound)}" for name, bound in bindings]
        return f"{target.name}({', '.join(parts)})"

    def _bound(self, target: Target, scope: str) -> dict[str, Bound]:
        return applying(scope, self._bindings.get(id(target.value), ()))

    def _value(self, value: Any, bound: Bound) -> Any:
        """Returns the literal, object or factory for a part of a binding."""
        if isinstance(value, dict):
            return {self._value(k, bound): self._value(v, bound) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._value(item, bound) for item in value)
        if isinstance(value, Macro):
            return self.macro(value.name)
        if isinstance(value, Reference):
            factory = Factory(self, _target(value, bound), value.scope)
            return factory() if value.evaluate else factory
        return value

    def _text(self, value: Any, bound: Bound) -> str:
        if isinstance(value, dict):
            items = (f"{self._text(k, bound)}: {self._text(v, bound)}" for k, v in value.items())
            return "{" + ", ".join(items) + "}"
        if isinstance(value, list | tuple):
            return "(" + ", ".join(self._text(item, bound) for item in value) + ")"
        if isinstance(value, Macro) and value.name in self._macros:
            with _scope(value.name):
                named = self._macros[value.name]
                return self._text(named.value, named)
        if isinstance(value, Reference):
            return self.describe(_target(value, bound), value.scope)
        return repr(value)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Factory:
    """A function or class that is called with its bindings in an isolated configuration."""

    configuration: Isolated
    target: Target
    scope: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.configuration.call(self.target, self.scope, *args, **kwargs)

    def plain(self) -> Any:
        """Returns the same without the configuration: the function or class, or a functools.partial of it."""
        values = self.configuration.values(self.target, self.scope)
        return functools.partial(self.target.value, **values) if values else self.target.value

    def __repr__(self) -> str:
        return self.configuration.describe(self.target, self.scope)


def _target(reference: Reference, bound: Bound) -> Target:
    target = dict(bound.references)[reference]
    assert target is not None  # unresolved references are problems when the configuration is read
    return target


@contextlib.contextmanager
def _scope(name: str) -> Iterator[None]:
    token = _SCOPE.set(name)
    try:
        yield
    finally:
        _SCOPE.reset(token)
