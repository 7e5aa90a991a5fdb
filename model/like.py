"""`like`: a factory of modules like those of another factory, but of another class.

A method that replaces a layer by a subclass or by a mixture of it takes the layer's settings from the factory of the plain
layer, so that all bindings of that layer hold for the method too.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

OWN = ("name", "parent")  # of flax; every module has its own


def like(
    plain: Callable[..., Any],
    made: Callable[..., Any],
    *,
    of: type | tuple[type, ...],
    own: Mapping[str, str] | None = None,
    **settings: Any,
) -> Callable[..., Any]:
    """Returns a factory that calls `made` with the fields of the module that `plain` would make.

    It copies the fields that both modules have, except `own` ones and those with which it is called. A binding of a
    copied field of `made` could have no effect, so the check of configurations refuses it: launch/config/parameters.py
    reads calls of this function, whose first two arguments have to be parameters of the caller.

    Args:
      plain: factory of modules of exactly the class `of` (or one of them), since what a subclass computes would be lost.
      made: factory of the modules that replace them.
      of: class of the plain modules.
      own: fields of the plain module that are not copied, with the field of `made` that holds its own value instead.
      settings: fields that only `made` has.

    Raises:
      ValueError: (raised by the returned factory) `plain` makes another class, or has a value other than the default in a
        field that `made` does not have, or whose own field in `made` has the default.
    """
    classes, own = of if isinstance(of, tuple) else (of,), own or {}

    def make(**passed: Any) -> Any:
        outside = {**passed, "name": None, "parent": None}
        module = plain(**outside)
        here, there = type(made(**outside, **settings)), type(module)
        if there not in classes:
            names = " or ".join(one.__name__ for one in classes)
            raise ValueError(
                f"{here.__name__} takes the settings of a module of {names}, not of {there.__name__}, whose computation "
                "would be lost. Bind the plain module, or remove one of the methods."
            )
        values = {name: getattr(module, name) for name in copied(classes, here, own)}
        replaced = made(**{**values, **settings, **passed})
        for field in dataclasses.fields(there):
            other = own.get(field.name, field.name)
            if field.name in (*values, *passed, *OWN) or not _is_set(module, field.name):
                continue
            if not _is_set(replaced, other):
                exists = hasattr(replaced, other)
                raise ValueError(
                    f"{there.__name__}.{field.name} has no effect on {here.__name__}, which replaces that module: "
                    + (f"set {here.__name__}.{other} too." if exists else "remove one of the two.")
                )
        return replaced

    return make


def copied(classes: Iterable[type], made: type, own: Iterable[str]) -> set[str]:
    """Returns the names of the fields that `like` copies from modules of `classes` to modules of the class `made`."""
    names = {field.name for one in classes for field in dataclasses.fields(one) if field.init}
    return (names & {field.name for field in dataclasses.fields(made)}) - {*own, *OWN}


def _is_set(module: Any, name: str) -> bool:
    """Returns whether a module has a field of this name with another value than the default.

    A class or function that gin has wrapped, for the bindings of its own parameters, is no other one.
    """
    fields = {field.name: field.default for field in dataclasses.fields(module)}
    if name not in fields:
        return False
    value, default = getattr(module, name), fields[name]
    return value != default and _named(value) != _named(default)


def _named(value: Any) -> Any:
    return getattr(value, "__module__", ""), getattr(value, "__qualname__", value)
