"""Describes functions that gin configures, for the keys of stored programs: what they are bound to in the loaded configuration."""

import inspect
import types
from collections.abc import Iterator
from typing import Any

import gin

from trainers.programs import replacements

_GIN = "gin.config"


def register() -> None:
    """Makes configured functions and classes describable (trainers/programs/description.py)."""
    replacements.replace_values(described)


def described(value: Any) -> Any:
    """Returns the function or class that gin has wrapped, its scopes, and all bindings that a call of it may read.

    Returns NotImplemented for a value that gin has not wrapped, or that it does not know.
    """
    if isinstance(value, types.FunctionType):
        if value.__globals__.get("__name__") != _GIN:
            return NotImplemented
        configurable = gin.config._inverse_lookup(value, allow_decorators=True)
    elif isinstance(value, type) and type(value).__module__ == _GIN:
        classes = map(gin.config._INVERSE_REGISTRY.get, inspect.getmro(value))
        configurable = next(filter(None, classes), None)
    else:
        return NotImplemented
    if configurable is None:
        return NotImplemented
    scopes = [gin.current_scope_str(), *_scopes(value)]
    return "gin", configurable.wrapped, scopes, bindings(configurable.selector)


def bindings(selector: str) -> list[str]:
    """Returns the bindings of a configurable in all scopes, and of all that they refer to, as sorted lines."""
    lines: set[str] = set()
    pending: list[tuple[str | None, str]] = [(None, selector)]
    done = set()
    while pending:
        if (wanted := pending.pop()) in done:
            continue
        done.add(wanted)
        scope, name = wanted
        for (bound_scope, bound_name), parameters in gin.config._CONFIG.items():
            if bound_name != name or scope not in (None, bound_scope):
                continue
            for parameter, value in parameters.items():
                lines.add(f"{bound_scope}/{bound_name}.{parameter} = {value!r}")
                pending += _references(value)
    return sorted(lines)


def _references(value: Any) -> Iterator[tuple[str | None, str]]:
    """Yields (scope, selector) of the references in a value; the scope is None, for any, but of a macro, which is its name."""
    if isinstance(value, gin.config.ConfigurableReference):
        configurable = value.configurable
        is_macro = configurable.selector in ("gin.macro", "gin.constant")
        yield "/".join(value.scopes) if is_macro else None, configurable.selector
    elif isinstance(value, dict):
        for pair in value.items():
            for item in pair:
                yield from _references(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _references(item)


def _scopes(value: Any) -> Iterator[str]:
    """Yields the scopes in which gin calls a reference."""
    if isinstance(value, type):
        wrappers = [vars(meta).get("__call__") for meta in inspect.getmro(type(value))]
    else:
        wrappers = [value]
    for wrapper in wrappers:
        while isinstance(wrapper, types.FunctionType):
            scope = inspect.getclosurevars(wrapper).nonlocals.get("scope_components")
            if scope:
                yield "/".join(scope)
            wrapper = getattr(wrapper, "__wrapped__", None)
