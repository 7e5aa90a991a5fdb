"""Writes gin text that builds a model, for the configuration of imported weights.

A model is a tree of settings: modules as factories (functools.partial of a class, or the class), frozen
dataclasses as values. A class with several settings (such as norms of two kinds) has a gin scope for each.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from espalier.launch.config.build import configured
from espalier.launch.config.model_file import import_lines, module_names
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Block, Transformer

# Settings written as macros, because files of methods wrap these macros; written even if they are defaults.
_MACROS = {"attention": "ATTENTION", "mlp": "MLP"}
_WRITTEN: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((Transformer, EncoderDecoder), ("block",)),
    Block: tuple(_MACROS),
}
_LITERALS = (str, int, float, bool, type(None))
_OF_FLAX = ("parent", "name")


class UnwritableModelError(ValueError):
    """A setting that cannot be written in gin."""


@dataclasses.dataclass(frozen=True)
class _Node:
    """A class or function with settings; equal nodes share one gin scope.

    Attributes:
      target: the class or function.
      settings: (field, value) pairs; values are nodes or literals as text.
      called: whether the value is `@f()` and not `@f`.
      where: path of the setting, for names and messages; not compared.
    """

    target: Any
    settings: tuple[tuple[str, Any], ...]
    called: bool
    where: str = dataclasses.field(compare=False)

    def all(self) -> Iterator["_Node"]:
        for _, value in self.settings:
            if isinstance(value, _Node):
                yield from value.all()
        yield self


def write(model: Any, macros: Mapping[str, Any] | None = None) -> str:
    """Returns gin text in which the macro MODEL is `model`.

    Args:
      model: a linen module whose factories are importable.
      macros: further macros with their literal values, such as START_TOKEN.

    Raises:
      UnwritableModelError: a setting is a function or an object that cannot be imported.
    """
    root = _node(model, "model")
    nodes = dict.fromkeys(root.all())  # Once each, in order.
    modules = module_names({node.target.__module__ for node in nodes})
    scopes = _scopes(nodes)

    def name(node: _Node) -> str:
        return f"{modules[node.target.__module__]}.{node.target.__qualname__}"

    def text(value: Any) -> str:
        if not isinstance(value, _Node):
            return value
        return f"@{scopes[value]}{name(value)}{'()' if value.called else ''}"

    lines = ["from __gin__ import dynamic_registration", "", *import_lines(modules)]
    lines += ["", f"MODEL = {text(root)}"]
    lines += [f"{key} = {value!r}" for key, value in (macros or {}).items()]
    for node in reversed(nodes):
        if node.settings:
            lines.append("")
        for key, value in node.settings:
            right = text(value)
            if node.target is Block and not scopes[node] and key in _MACROS:
                lines.append(f"{_MACROS[key]} = {right}")
                right = f"%{_MACROS[key]}"
            lines.append(f"{scopes[node]}{name(node)}.{key} = {right}")
    return "\n".join(lines) + "\n"


def _node(value: Any, where: str) -> _Node:
    """Returns the node of a module, dataclass, factory or function."""
    if (of := configured(value)) is not None:  # a factory of a run's model
        value = of.plain()
    if isinstance(value, functools.partial):
        if value.args:
            raise UnwritableModelError(
                f"{where} is a partial with positional arguments: name them."
            )
        target, bound, called = value.func, dict(value.keywords), False
    elif inspect.isclass(value) or inspect.isroutine(value):
        target, bound, called = value, {}, False
    else:
        target, called = type(value), True
        fields = [f for f in dataclasses.fields(value) if f.init and f.name not in _OF_FLAX]
        bound = {f.name: getattr(value, f.name) for f in fields}
    if not _importable(target):
        raise UnwritableModelError(
            f"{where} is {target!r}, which cannot be imported by a name, so no configuration can "
            "name it. Use a class or function at the top of a module."
        )
    defaults = _defaults(target)
    written = _WRITTEN.get(target, ())
    settings = tuple(
        (key, _value(item, f"{where}.{key}"))
        for key, item in ({key: defaults[key] for key in written} | bound).items()
        if key in written or key not in defaults or not _same(item, defaults[key])
    )
    return _Node(target, settings, called, where)


def _value(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) or callable(value):
        return _node(value, where)
    if isinstance(value, (tuple, list, dict)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        if all(isinstance(_value(part, where), str) for part in parts):
            return repr(value)
    if isinstance(value, _LITERALS):
        return repr(value)
    raise UnwritableModelError(f"{where} = {value!r} has no form in gin: use a literal.")


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))


def _importable(target: Any) -> bool:
    module = inspect.getmodule(target)
    return getattr(module, getattr(target, "__name__", ""), None) is target


def _defaults(target: Any) -> dict[str, Any]:
    parameters = inspect.signature(target).parameters.values()
    values = {p.name: p.default for p in parameters if p.default is not p.empty}
    if dataclasses.is_dataclass(target):  # Its signature does not show values of default factories.
        for field in dataclasses.fields(target):
            if field.default_factory is not dataclasses.MISSING:
                values[field.name] = field.default_factory()
    return values


def _scopes(nodes: Mapping[_Node, None]) -> dict[_Node, str]:
    """Returns the scope of each node with its slash; '' for a class with only one set of settings.

    Bindings without a scope also apply in all scopes, so either no set of a class has a scope or every set has one.
    """
    sets: dict[Any, set] = {}
    for node in nodes:
        sets.setdefault(node.target, set()).add(node.settings)
    taken: dict[tuple, str] = {}
    scopes = dict.fromkeys(nodes, "")
    for node in nodes:
        if len(sets[node.target]) > 1 and node.settings:
            key = (node.target, node.settings)
            if key not in taken:
                scope = node.where.removeprefix("model.").replace(".", "_")
                while scope in taken.values():
                    scope += "_"
                taken[key] = scope
            scopes[node] = f"{taken[key]}/"
    return scopes
