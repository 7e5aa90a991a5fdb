"""Builds the objects of a configuration: evaluates its bindings, and records those that it uses.

A configuration is a value. Nothing is registered or set for the process, so that several may be in use at once: the run's
own, and those of the models that it only reads.

The rules are gin's: bindings of the current scope and of the scopes around it apply, inner ones win; `@x/f` is called in
the scope `x`, `@f` in the scope in which it is called; the value of `%NAME` is evaluated in the scope `NAME`, each
time; a caller's arguments win over bindings. What `@f` without a call gives is a function or class of the same name,
signature and documentation, which adds the bindings to a call's arguments: classes stay classes, for `nn.scan` and `nn.remat`.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import gin

from espalier.launch.config import text
from espalier.launch.config.gin_reader import Bound, Checked, Target, applying, final_bound
from espalier.launch.config.gin_source import is_written_as_itself
from espalier.launch.config.values import Macro, Place, Problem, Reference, mapped

# The configuration whose function is running, and the scope. Factories are called while a step is traced, possibly in
# another thread, which begins without both.
_RUNNING: contextvars.ContextVar[tuple["Configuration | None", str]] = contextvars.ContextVar(
    "running", default=(None, "")
)
_CONFIGURED = "_configured"  # attribute of a class that a configuration has made of `@f`
_DEFAULT = Place("a default")


def running() -> "Configuration | None":
    """Returns the configuration that made the innermost call which is now running; None without one."""
    return _RUNNING.get()[0]


class Configuration:
    """The bindings of a configuration that was read without problems, and what is built of them.

    Attributes:
      tree: what was read; it does not change any more.
      entry: the function to call, with its bindings; None without one.
      shows_bindings: whether the text (`repr`) of a module has the bindings of the functions and classes in its fields.
        These are then no classes themselves.
    """

    def __init__(self, tree: Checked, entry: str = "", *, shows_bindings: bool = False):
        """Args:
        tree: what was read.
        entry: full name of the entry function.
        shows_bindings: see above.
        """
        self.tree = tree
        self.shows_bindings = shows_bindings
        self._entry = tree.targets[entry] if entry else None
        self._singletons: dict[str, Any] = {}
        self._factories: dict[tuple[str, str], Any] = {}
        self._used: dict[tuple[str, Target], dict[str, Bound]] = {}
        self._used_macros: set[str] = set()
        self._lock = threading.Lock()
        self._bindings = tree.by_target()
        bound = [tree.targets[name] for name in self._bindings]
        self._methods = [target for target in bound if target.is_method]

    @property
    def entry(self) -> Callable[..., Any] | None:
        return None if self._entry is None else self.factory(self._entry)

    @property
    def files(self) -> tuple[str, ...]:
        """All files that were read in order, included ones too."""
        return tuple(self.tree.files)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Bindings in files without effect, unless a later file replaced the reference to their target."""
        return tuple(self.tree.warnings)

    @property
    def modules(self) -> list[str]:
        """The modules that the files import."""
        return list(dict.fromkeys(statement.module for statement in self.tree.imports))

    @property
    def macros(self) -> dict[str, Any]:
        """The final values of the macros by name."""
        final = self.tree.macros
        return {name: final_bound(bound, final).value for name, bound in final.items()}

    @functools.cached_property
    def text(self) -> str:
        """All bindings as one gin file that can be loaded again."""
        settings: dict[tuple[str, Target], dict[str, Bound]] = {}
        for (scope, name, argument), bound in self.tree.bindings.items():
            settings.setdefault((scope, self.tree.targets[name]), {})[argument] = bound
        return text.gin(self.tree.imports, self.tree.all_macros(), settings)

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Context manager in which `running` returns this configuration, as it does while its entry function runs."""
        return self._in("")

    def give_to_gin(self) -> None:
        """Gives gin the bindings of functions of users' modules that have gin's own decorator; see below.

        Raises:
          ValueError: the decorator excludes an argument.
        """
        targets = self.tree.targets
        own = {name for name, target in targets.items() if _is_decorated(target)}
        _give(
            [
                (scope, targets[name], argument, functools.partial(self._given, key))
                for key in self.tree.bindings
                for scope, name, argument in [key]
                if name in own
            ]
        )

    def _given(self, key: tuple[str, str, str]) -> Any:
        """Returns the value of a binding that gin passes to a call."""
        (scope, name, argument), bound = key, self.tree.bindings[key]
        with self._lock:
            self._used.setdefault((scope, self.tree.targets[name]), {})[argument] = bound
        return self._value(bound.value)

    def operative_text(self) -> str:
        """Returns the bindings that were used so far, and the defaults of the functions called, as a gin file."""
        with self._lock:
            used = {key: dict(values) for key, values in self._used.items()}
            macros = {name: self.tree.macros[name] for name in self._used_macros}
        return text.gin(self.tree.imports, macros, used)

    def macro(self, name: str) -> Any:
        """Returns the value of the macro `name`.

        Raises:
          ValueError: the macro has no value.
        """
        if name not in self.tree.macros:
            raise ValueError(f"macro '{name}' has no value")
        with self._lock:
            self._used_macros.add(name)
        with self._in(name):
            return self._value(self.tree.macros[name].value)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments that the entry function would be called with, references evaluated."""
        assert self._entry is not None
        return self._values(self._bound(self._entry, ""), "")

    def value(self, name: str) -> Any:
        """Returns the value of a macro or a binding, references evaluated.

        Args:
          name: of a macro, or of a binding by its scope and the end of its full name, such as 'adamw.b2'.

        Raises:
          KeyError: nothing of this name has a value.
        """
        if name in self.tree.macros:
            return self.macro(name)
        scope, _, end = name.rpartition("/")
        for (inner, target, argument), bound in self.tree.bindings.items():
            if inner == scope and f".{target}.{argument}".endswith(f".{end}"):
                return self._values({argument: bound}, scope)[argument]
        raise KeyError(name)

    def called_in(self, macro: str) -> Any:
        """Returns the function or class that the value of a macro is a call of or refers to; None for other values."""
        bound = self.tree.macros.get(macro)
        if bound is None or not isinstance(bound.value, Reference):
            return None
        return bound.value.target.value

    def bound_to(self, called: Any, *names: str) -> dict[str, Any]:
        """Returns {argument: value} for these arguments of a function or class, if they are bound without a scope."""
        known = [target for target in self.tree.targets.values() if target.value is called]
        bound = self._bound(known[0], "") if known else {}
        return self._values({name: bound[name] for name in names if name in bound}, "")

    def factory(self, target: Target, scope: str = "") -> Any:
        """Returns a function or class that adds its bindings in `scope` to the arguments of each call."""
        key = (target.name, scope)
        if key not in self._factories:  # one object, so that equal modules compare equal
            made = _factory(Configured(self, target, scope))
            with self._lock:
                self._factories.setdefault(key, made)
        return self._factories[key]

    def call(
        self,
        target: Target,
        scope: str,
        args: Collection[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        make: Callable[..., Any] | None = None,
    ) -> Any:
        """Calls a function or class with its bindings in `scope`, or in the current scope if `scope` is empty.

        Args:
          target: the function or class.
          scope: scope of the call.
          args, kwargs: arguments that win over bindings.
          make: what is called in its place, such as a subclass.
        """
        scope, kwargs = scope or self._scope(), kwargs or {}
        if target.value is gin.config.macro:
            return self.macro(scope)
        signature = _signature(target.value)
        passed = {*kwargs, *signature.positional[: len(args)]}
        bound = {k: v for k, v in self._bound(target, scope).items() if k not in passed}
        defaults = {k: v for k, v in signature.defaults.items() if k not in passed}
        with self._lock:
            self._used.setdefault((scope, target), {}).update({**defaults, **bound})
        values = self._values(bound, scope)
        with self._in(scope):
            if target.value is gin.config.singleton:
                if scope not in self._singletons:
                    self._singletons[scope] = values["constructor"]()
                return self._singletons[scope]
            return (make or self._with_methods(target.value))(*args, **values, **kwargs)

    def describe(self, target: Target, scope: str) -> str:
        """Returns `name(argument=value, ...)` with all bindings of a call; the same text in every process."""
        scope = scope or self._scope()
        with self._in(scope):
            bindings = sorted(self._bound(target, scope).items())
            parts = [f"{name}={self._text(bound.value)}" for name, bound in bindings]
        return f"{target.name}({', '.join(parts)})"

    def _scope(self) -> str:
        running, scope = _RUNNING.get()
        return scope if running is self else ""

    @contextlib.contextmanager
    def _in(self, scope: str) -> Iterator[None]:
        token = _RUNNING.set((self, scope))
        try:
            with _gin_scope(scope):
                yield
        finally:
            _RUNNING.reset(token)

    def _bound(self, target: Target, scope: str) -> dict[str, Bound]:
        return applying(scope, self._bindings.get(target.name, ()))

    def _values(self, bound: Mapping[str, Bound], scope: str) -> dict[str, Any]:
        with self._in(scope):
            return {argument: self._value(one.value) for argument, one in bound.items()}

    def _value(self, written: Any) -> Any:
        """Returns what a value of a binding gives: literals, objects and factories."""

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Macro):
                return self.macro(leaf.name)
            if not isinstance(leaf, Reference):
                return leaf
            return (self.call if leaf.evaluate else self.factory)(leaf.target, leaf.scope)

        return mapped(written, value)

    def _text(self, value: Any) -> str:
        if isinstance(value, dict):
            items = (f"{self._text(k)}: {self._text(v)}" for k, v in value.items())
            return "{" + ", ".join(items) + "}"
        if isinstance(value, list | tuple):
            return "(" + ", ".join(map(self._text, value)) + ")"
        if isinstance(value, Macro) and value.name in self.tree.macros:
            with self._in(value.name):
                return self._text(self.tree.macros[value.name].value)
        if isinstance(value, Reference):
            return self.describe(value.target, value.scope)
        return repr(value)

    def _with_methods(self, made: Any) -> Any:
        """Returns a class, or a subclass of it with bindings for those of its methods that have any; other values unchanged."""
        if not inspect.isclass(made):
            return made
        own = {
            target.value.__name__: self.factory(target)
            for target in self._methods
            if inspect.getattr_static(made, target.value.__name__, None) is target.value
        }
        meta: Any = type(made)
        return meta(made.__name__, (made,), {**own, **_named(made)}) if own else made


@dataclasses.dataclass(frozen=True, eq=False)
class Configured:
    """A function or class that is called with its bindings in a scope of a configuration."""

    configuration: Configuration
    target: Target
    scope: str

    def plain(self) -> Any:
        """Returns the same without the configuration: the function or class, or a functools.partial of it."""
        bound = self.configuration._bound(self.target, self.scope)
        values = self.configuration._values(bound, self.scope)
        return functools.partial(self.target.value, **values) if values else self.target.value

    def __repr__(self) -> str:
        return self.configuration.describe(self.target, self.scope)


def configured(value: Any) -> Configured | None:
    """Returns what a configuration has made a factory of; None for any other value."""
    if isinstance(value, _Function):
        return value.of
    return vars(value).get(_CONFIGURED) if inspect.isclass(value) else None


def _factory(of: Configured) -> Any:
    """Returns a function or class instead of `of`, with its name, signature and documentation."""
    call, target = of.configuration.call, of.target
    made: Any
    if inspect.isclass(target.value) and not of.configuration.shows_bindings:
        meta: Any = type(target.value)

        def construct(cls: Any, *args: Any, **kwargs: Any) -> Any:
            # Code may make subclasses of the factory, as nn.remat does: these are made, with the same bindings.
            make = None if cls is made else functools.partial(meta.__call__, cls)
            return call(target, of.scope, args, kwargs, make)

        calling = type(meta)(meta.__name__, (meta,), {"__call__": construct})
        named = {**_named(target.value), _CONFIGURED: of}
        made = calling(target.value.__name__, (target.value,), named)
        return made
    return _Function(of)


class _Function:
    """A function instead of another one (or of a class), whose bindings it adds to the arguments of each call."""

    def __init__(self, of: Configured):
        names: tuple[str, ...] = ("__module__", "__qualname__", "__doc__", "__annotations__")
        if not of.configuration.shows_bindings:  # flax shows what has a name by it
            names = ("__name__", *names)
        functools.update_wrapper(self, of.target.value, names, ())
        self.of = of

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.of.configuration.call(self.of.target, self.of.scope, args, kwargs)

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else functools.partial(self, owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Function":
        return self

    def __repr__(self) -> str:
        return repr(self.of)


def _named(made: type) -> dict[str, Any]:
    """Returns the attributes of a subclass that looks like the class itself."""
    names = {name: getattr(made, name) for name in ("__module__", "__qualname__", "__doc__")}
    return names if made.__dictoffset__ else {**names, "__slots__": ()}


@dataclasses.dataclass(frozen=True)
class _Signature:
    """The names of positional arguments, and the defaults that gin can write."""

    positional: tuple[str, ...] = ()
    defaults: Mapping[str, Bound] = dataclasses.field(default_factory=dict)


@functools.cache
def _signature(called: Any) -> _Signature:
    is_class = inspect.isclass(called)
    function = called
    if is_class:
        holders = (vars(base) for base in inspect.getmro(called))
        own = next(v for v in holders if "__init__" in v or "__new__" in v)
        function = own.get("__init__") or own["__new__"]
    try:
        spec = inspect.getfullargspec(function)
    except TypeError:
        return _Signature()
    defaults = dict(zip(reversed(spec.args), reversed(spec.defaults or ()), strict=False))
    defaults = {**dict(reversed(defaults.items())), **(spec.kwonlydefaults or {})}
    written = {
        name: Bound(value, _DEFAULT)
        for name, value in defaults.items()
        if is_written_as_itself(value)
    }
    return _Signature(tuple(spec.args[is_class:]), written)


# Functions and classes of users' modules that have gin's own decorator: `@gin.configurable` reads gin's own state, also where
# a user's code calls the function itself. The bindings of such functions are therefore given to gin, and no others: without
# them, nothing of this project changes gin's state.
_given = False  # whether gin has bindings of the last configuration


def _is_decorated(target: Target) -> bool:
    """Returns whether gin's own decorator was applied to a function or class."""
    if target.value in (gin.config.macro, gin.config.singleton):
        return False
    try:
        gin.get_configurable(target.value)
    except (TypeError, ValueError):  # no hash, or not registered
        return False
    return True


def _give(bindings: Sequence[tuple[str, Target, str, Callable[[], Any]]]) -> None:
    """Gives gin the bindings of a configuration, instead of those of the last one.

    Args:
      bindings: (scope, decorated function or class, argument, a function that returns the value).

    Raises:
      ValueError: the decorator excludes the argument.
    """
    global _given
    if bindings or _given:
        gin.clear_config()
    _given = bool(bindings)
    for scope, target, argument, value in bindings:
        name = f"{target.value.__module__}.{target.value.__qualname__}"
        with gin.unlock_config():
            gin.bind_parameter((scope, name, argument), _Late(value))


class _Late:
    """A value that is made when gin passes it to a call: gin passes a deep copy of what is bound."""

    def __init__(self, value: Callable[[], Any]):
        self._value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._value()


def _gin_scope(name: str) -> contextlib.AbstractContextManager[Any]:
    """Context manager in which gin has a scope too, if it has bindings."""
    if not _given:
        return contextlib.nullcontext()
    return gin.config_scope(name.split("/") if name else None)
