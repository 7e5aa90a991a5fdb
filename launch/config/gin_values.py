"""The check of the values in a configuration against the annotations of the parameters that they are bound to.

Only certain errors are reported. Numbers lie in the range that the parameter declares (espalier/common/ranges.py); NaN, infinity and
numbers that 32 bits do not hold lie in none.
"""

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import operator
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import GroupedMetadata

from espalier.common.ranges import CalledWith
from espalier.launch.config.gin_reader import Target
from espalier.launch.config.gin_source import Macro, Reference

_SIMPLE = (int, float, str, bool, type(None))
_LARGEST_FLOAT32 = 3.4028234e38
_BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """A list or tuple; `items` are the types and values of its elements, None where unknown."""

    items: tuple[Any, ...] | None


@dataclasses.dataclass(frozen=True)
class _Mapping:
    """A dict; `items` are the types and values of its values, None where unknown."""

    items: tuple[Any, ...] | None


@dataclasses.dataclass(frozen=True)
class _Object:
    """A function, or an object of this project's class, which only a reference can be."""

    name: str


def mismatch(
    target: Any,
    argument: str,
    value: Any,
    referenced: collections.abc.Mapping[Reference, Target | None] | None = None,
) -> str | None:
    """Returns the error of binding `value` to `argument` of `target`, or None.

    Simple annotations, their unions with None, literals, sequences and mappings of these, and this project's classes
    are checked. References that gin calls, macros without a value and other annotations pass.

    Args:
      target: a function or class.
      argument: name of a parameter.
      value: a literal, reference or macro, or a container of them.
      referenced: the targets of the references in the value.
    """
    annotation = hints(target).get(argument)
    if isinstance(value, Reference):
        referred = (referenced or {}).get(value)
        if referred is not None and (problem := _wrong_reference(annotation, value, referred)):
            return problem
    accepted = _accepted(annotation)
    if accepted is None or any(_fits(value, option) for option in accepted):
        return next(_out_of_range(annotation, value), None)
    choices = [o for o in accepted if not isinstance(o, type | _Sequence | _Mapping | _Object)]
    if choices and isinstance(value, str):
        near = difflib.get_close_matches(value, [c for c in choices if isinstance(c, str)], n=1)
        hint = f" Nearest: {near[0]!r}." if near else ""
        return f"cannot be {value!r}: choose from {', '.join(map(repr, choices))}.{hint}"
    wanted = " or ".join(_name(option) for option in accepted)
    kind = "a function or class" if isinstance(value, Reference) else type(value).__name__
    message = f"takes {wanted}, not {value!r} ({kind})"
    # A string is also a sequence, of its letters, but a single item was probably meant.
    for option in accepted:
        if isinstance(option, _Sequence) and _fits([value], option):
            return f"{message}: write [{value!r}]"
    return message


def has_range(annotation: Any) -> bool:
    """Returns whether an annotation declares a range for each of its numbers."""
    if typing.get_origin(annotation) in (Annotated, collections.abc.Callable):
        return True  # no number is a function
    return annotation not in (int, float) and all(map(has_range, typing.get_args(annotation)))


def _wrong_reference(annotation: Any, reference: Reference, target: Target) -> str | None:
    """Returns the error of a reference of which it is certain that it gives another kind of object."""
    if isinstance(declaration(annotation), CalledWith):
        annotation = typing.get_args(annotation)[0]
    returned: Any = (
        target.value if inspect.isclass(target.value) else hints(target.value).get("return")
    )
    classes = _classes(annotation)
    wanted = f"takes an object of {' or '.join(c.__name__ for c in classes)}"
    known = classes and inspect.isclass(returned) and _is_own(returned)
    if known and not any(_may_be(returned, kind) for kind in classes):
        return f"{wanted}, not {reference!r}, which is of {returned.__name__}"
    if not reference.evaluate and (classes or _same_function(returned, annotation)):
        result = wanted if classes else "takes the function that it returns"
        return f"{result}, not {reference!r} itself: write @{reference.name}()"
    if reference.evaluate and _is_result(returned, annotation):
        return f"takes the function itself, not its result {reference!r}: write @{reference.name}"
    return None


def _same_function(returned: Any, annotation: Any) -> bool:
    """Returns whether a function returns functions of just the type that an annotation takes."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if union else (annotation,)
    return typing.get_origin(returned) is collections.abc.Callable and returned in parts


def _is_result(returned: Any, annotation: Any) -> bool:
    """Returns whether an annotation takes functions that return what a function returns."""
    if typing.get_origin(annotation) is not collections.abc.Callable or returned in (None, Any):
        return False
    return typing.get_args(annotation)[1] == returned


def _may_be(made: type, wanted: type) -> bool:
    """Returns whether an object of one class may be one of another; for a protocol, by its methods."""
    if getattr(wanted, "_is_protocol", False):
        methods = [name for name, _ in inspect.getmembers(wanted, inspect.isfunction)]
        return all(hasattr(made, name) for name in methods if not name.startswith("_"))
    return issubclass(made, wanted) or issubclass(wanted, made)


def _classes(annotation: Any) -> tuple[type, ...]:
    """Returns the classes of which an annotation takes objects; () for any that cannot be compared."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = [
        p for p in (typing.get_args(annotation) if union else [annotation]) if p is not type(None)
    ]
    known = all(inspect.isclass(p) and p not in (object, Any, type) for p in parts)
    protocols = [p for p in parts if getattr(p, "_is_protocol", False)]
    called = any("__call__" in vars(p) for p in protocols)  # functions too
    return tuple(parts) if known and not called and not any(map(typing.get_origin, parts)) else ()


def _out_of_range(annotation: Any, value: Any) -> Iterator[str]:
    """Yields the problem of each number in a value that lies outside of the range of its annotation."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if origin is Annotated and number:
        yield from _outside(value, parts[1:])
    elif origin is Annotated:
        yield from _out_of_range(parts[0], value)
    elif origin in (typing.Union, types.UnionType):
        # A value that fits several parts needs to lie in the range of one.
        fitting = [p for p in parts if any(_fits(value, o) for o in _accepted(p) or ())]
        problems = [list(_out_of_range(part, value)) for part in fitting]
        yield from min(problems, key=len, default=[])
    elif number and annotation is float:
        yield from _outside(value, ())
    elif origin is collections.abc.Mapping and isinstance(value, dict):
        for item in value.values():
            yield from _out_of_range(parts[1], item)
    elif origin in (collections.abc.Sequence, tuple, list) and isinstance(value, list | tuple):
        fixed = origin is tuple and parts[-1] is not ...
        for item, part in zip(value, parts if fixed else [parts[0]] * len(value), strict=False):
            yield from _out_of_range(part, item)


def _outside(number: float, constraints: tuple[Any, ...]) -> Iterator[str]:
    """Yields the problem of a number that does not keep within its bounds."""
    single = [b for c in constraints for b in (c if isinstance(c, GroupedMetadata) else [c])]
    bounds = [(key, getattr(b, key)) for b in single for key in _BOUNDS if hasattr(b, key)]
    if isinstance(number, float) and not abs(number) <= _LARGEST_FLOAT32:
        yield f"is {number!r}, but takes a finite number that a float of 32 bits can hold"
        return
    holds = [_BOUNDS[key][0](number, bound) for key, bound in bounds]
    if not all(holds):
        # The largest number that the programs hold matters only to larger ones.
        named = [b for b, is_kept in zip(bounds, holds, strict=True) if b[1] < 2**31 or not is_kept]
        limits = " and ".join(f"{_BOUNDS[key][1]} {bound}" for key, bound in named)
        yield f"is {number!r}, but takes a number that is {limits}"


def _accepted(annotation: Any) -> list[Any] | None:
    """Returns the types and literal values that an annotation allows; None if it is not a simple one."""
    if annotation in _SIMPLE:
        return [annotation]
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _accepted(parts[0])
    if origin is typing.Literal:
        return list(parts)
    if origin is collections.abc.Callable:
        return [_Object("a function, as @module.name")]
    if inspect.isclass(annotation) and _is_own(annotation):
        return [_Object(f"an object of {annotation.__name__}, as @module.name()")]
    if origin is collections.abc.Sequence or (origin is tuple and parts[-1] is ...):
        items = _accepted(parts[0])
        return [_Sequence(None if items is None else tuple(items))]
    if origin is collections.abc.Mapping:
        items = _accepted(parts[1])
        return [_Mapping(None if items is None else tuple(items))]
    if origin in (typing.Union, types.UnionType):
        options = [_accepted(part) for part in parts]
        return None if None in options else [o for option in options for o in option or ()]
    return None


def _fits(value: Any, option: Any) -> bool:
    if isinstance(value, Macro) or (isinstance(value, Reference) and value.evaluate):
        return True
    if isinstance(option, _Object):
        return value is None or isinstance(value, Reference)  # None may stand for none bound
    if isinstance(option, _Sequence | _Mapping):
        kind = list | tuple if isinstance(option, _Sequence) else dict
        values = value.values() if isinstance(value, dict) else value
        return isinstance(value, kind) and (
            option.items is None
            or all(any(_fits(item, wanted) for wanted in option.items) for item in values)
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
    if isinstance(option, _Object):
        return option.name
    if isinstance(option, _Sequence | _Mapping):
        kind = "list" if isinstance(option, _Sequence) else "dict"
        items = " or ".join(map(_name, option.items or ()))
        return f"a {kind} of {items}" if items else f"a {kind}"
    return option.__name__ if isinstance(option, type) else repr(option)


def _is_own(item: type) -> bool:
    return item.__module__.partition(".")[0] == "espalier"


@functools.cache
def declaration(annotation: Any) -> Any:
    """Returns what an annotation declares besides its type; None for nothing."""
    return annotation.__metadata__[0] if typing.get_origin(annotation) is Annotated else None


def hints(target: Any) -> dict[str, Any]:
    """Returns the annotations by parameter, with their ranges; {} if they cannot be evaluated."""
    holder = target
    if inspect.isclass(target) and "__init__" in vars(target):
        # A dataclass's __init__ carries its field annotations too.
        holder = target.__init__
    lasting = inspect.isclass(holder) or inspect.isroutine(holder)
    return _evaluated(holder) if lasting else _evaluated.__wrapped__(holder)


# A check asks for those of one function many times, and evaluating them was half of its time.
@functools.cache
def _evaluated(holder: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(holder, include_extras=True)
    except Exception:  # noqa: BLE001 (annotations may use names that exist only for type checkers)
        return {}
