"""Compares the literals of a gin configuration with the annotations of what they are bound to.

Only what can be told for certain is reported: simple annotations, their unions with None, literals,
lists of names and sequences. What calls and macros stand for, and anything under an annotation not
understood, pass.
"""

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import types
import typing
from typing import Any

from launch.config.gin_source import Macro, Reference

_SIMPLE = (int, float, str, bool, type(None))


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """A list or tuple; `items` are what its elements may be, None where that is not known."""

    items: tuple[Any, ...] | None


def mismatch(target: Any, argument: str, value: Any) -> str | None:
    """What is wrong with binding `value` to `argument` of `target`, or None."""
    accepted = _accepted(_hints(target).get(argument))
    if accepted is None:
        return None
    if any(_fits(value, option) for option in accepted):
        return None
    choices = [option for option in accepted if not isinstance(option, type | _Sequence)]
    if choices and isinstance(value, str):
        near = difflib.get_close_matches(value, [c for c in choices if isinstance(c, str)], n=1)
        hint = f" Nearest: {near[0]!r}." if near else ""
        return f"cannot be {value!r}: choose from {', '.join(map(repr, choices))}.{hint}"
    wanted = " or ".join(_name(option) for option in accepted)
    kind = "a function or class" if isinstance(value, Reference) else type(value).__name__
    message = f"takes {wanted}, not {value!r} ({kind})"
    # A string passes for a sequence, of its letters; a lone item is what is meant most often.
    for option in accepted:
        if isinstance(option, _Sequence) and _fits([value], option):
            return f"{message}: write [{value!r}]"
    return message


def _accepted(annotation: Any) -> list[Any] | None:
    """Types and literal values an annotation allows; None if it is not one of the simple ones."""
    if annotation in _SIMPLE:
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return list(typing.get_args(annotation))
    if origin is collections.abc.Sequence:
        items = _accepted(typing.get_args(annotation)[0])
        return [_Sequence(None if items is None else tuple(items))]
    if origin in (typing.Union, types.UnionType):
        parts = [_accepted(part) for part in typing.get_args(annotation)]
        return None if None in parts else [option for part in parts for option in part]
    return None


def _fits(value: Any, option: Any) -> bool:
    if isinstance(value, Macro) or (isinstance(value, Reference) and value.evaluate):
        return True
    if isinstance(option, _Sequence):
        return isinstance(value, list | tuple) and (
            option.items is None
            or all(any(_fits(item, wanted) for wanted in option.items) for item in value)
        )
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
    if isinstance(option, _Sequence):
        items = " or ".join(map(_name, option.items or ()))
        return f"a list of {items}" if items else "a list"
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
