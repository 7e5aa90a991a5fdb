"""Compares the literals of a gin configuration with the annotations of what they are bound to.

Only what can be told for certain is reported: simple annotations, their unions with None, literals
and lists of names. References, and anything under an annotation not understood, pass.
"""

import difflib
import functools
import inspect
import types
import typing
from typing import Any

from launch.gin_source import Macro, Reference

_SIMPLE = (int, float, str, bool, type(None))


def mismatch(target: Any, argument: str, value: Any) -> str | None:
    """What is wrong with binding `value` to `argument` of `target`, or None."""
    if isinstance(value, Macro | Reference):
        return None
    accepted = _accepted(_hints(target).get(argument))
    if accepted is None:
        return None
    if any(_fits(value, option) for option in accepted):
        return None
    choices = [option for option in accepted if not isinstance(option, type)]
    if choices and isinstance(value, str):
        near = difflib.get_close_matches(value, [c for c in choices if isinstance(c, str)], n=1)
        hint = f" Nearest: {near[0]!r}." if near else ""
        return f"cannot be {value!r}: choose from {', '.join(map(repr, choices))}.{hint}"
    wanted = " or ".join(_name(option) for option in accepted)
    return f"takes {wanted}, not {value!r} ({type(value).__name__})"


def _accepted(annotation: Any) -> list[Any] | None:
    """Types and literal values an annotation allows; None if it is not one of the simple ones."""
    if annotation in _SIMPLE:
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return list(typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        parts = [_accepted(part) for part in typing.get_args(annotation)]
        return None if None in parts else [option for part in parts for option in part]
    return None


def _fits(value: Any, option: Any) -> bool:
    if not isinstance(option, type):
        return type(value) is type(option) and value == option
    if option is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, option)


def _name(option: Any) -> str:
    if option is type(None):
        return "None"
    return option.__name__ if isinstance(option, type) else repr(option)


@functools.cache
def _hints(target: Any) -> dict[str, Any]:
    """Annotations by parameter, or nothing where they cannot be evaluated."""
    holder = target
    if inspect.isclass(target) and "__init__" in vars(target):
        # A dataclass's __init__ carries its field annotations too.
        holder = target.__init__
    try:
        return typing.get_type_hints(holder)
    except Exception:  # noqa: BLE001 (annotations may name what exists only for type checkers)
        return {}
