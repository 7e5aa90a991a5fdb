"""The parameters of a function or class: their names, types and ranges, and which of them its callers pass.

Values in a configuration are checked against the annotations of the parameters that they are bound to. Only certain errors are
reported. Numbers lie in the range that the parameter declares (espalier/common/ranges.py); NaN, infinity and numbers that 32 bits
do not hold lie in none.

A factory's caller passes some arguments itself (`self.dense(features=..., name=...)`). These win over gin, so a binding
of one would be ignored. `passed` reads the names of these arguments from the caller's source. A wrapper (model/like.py)
passes on what it is called with, and copies fields of the plain module; `wrapper` reads its call of `like`.
"""

import ast
import collections.abc
import dataclasses
import difflib
import functools
import inspect
import operator
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import gin
from annotated_types import GroupedMetadata

from espalier.common.ranges import CalledWith
from espalier.launch.config.values import Macro, Reference
from espalier.model.like import copied, like

_SIMPLE = (int, float, str, bool, type(None))
_LITERALS = (str, int, bytes, type(None))  # classes of the values in a Literal
_UNIONS = (typing.Union, types.UnionType)
_LARGEST_FLOAT32 = 3.4028234e38
_BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}

# Arguments that other code passes to a factory which its owner only forwards, by owner and parameter. Calls in the
# owner's own source need no row, nor do factories that are declared with CalledWith (espalier/common/ranges.py).
# tests/launch/config/gin_reach_test.py calls each and compares.
PASSED: dict[str, dict[str, tuple[str, ...]]] = {
    "espalier.data.t5.denoising.make_stream": {"stream": ("positions", "task")},
    "espalier.data.text.user_data.register_sources": {"sources": ("name",)},
    "espalier.launch.evaluate.held_out.evaluate": {"stream": ("task",)},
    "espalier.launch.train.train": {
        "checkpointer": ("directory",),
        "eval_stream": ("task",),
        "stream": ("positions",),
    },
    "espalier.trainers.recipe.Recipe": {
        "objective": ("model", "num_sources"),
        "optimizer": ("learning_rate", "param_axes"),
    },
}
# Functions with named slots (**slots), and the arguments that they pass to the factory in each slot.
_SLOTS = {
    "espalier.model.adapters.adapter.named": ("name",),
    "espalier.model.mlp.by_kind": ("config", "kind", "name"),
    "espalier.trainers.hooks.named": ("run",),
    "espalier.trainers.reports.named": ("params",),
}


@functools.cache
def parameter_names(target: Any) -> list[str] | None:
    """Returns the names that gin may bind; None for any (**kwargs), or if the signature is unknown."""
    parameters = _parameters(target)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    # `parent` of a linen module is set by flax.
    return [p.name for p in parameters if _is_named(p) and p.name not in ("parent", "self")]


def required_parameters(target: Any) -> list[str]:
    """Returns the parameters without a default."""
    if target in (gin.config.macro, gin.config.singleton):
        return []
    return [p.name for p in _parameters(target) or () if p.default is p.empty and _is_named(p)]


def _parameters(target: Any) -> list[inspect.Parameter] | None:
    """Returns the parameters of a function or class; None if they are unknown."""
    try:
        return list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def mismatch(target: Any, argument: str, value: Any) -> str | None:
    """Returns the error of binding `value` to `argument` of `target`, or None.

    Simple annotations, their unions with None, literals, sequences and mappings of these, and this project's classes
    are checked. References that gin calls, macros without a value and other annotations pass.

    Args:
      target: a function or class.
      argument: name of a parameter.
      value: a literal, reference or macro, or a container of them.
    """
    annotation = hints(target).get(argument)
    if isinstance(value, Reference) and (problem := _wrong_reference(annotation, value)):
        return problem
    if _fits(annotation, value):
        return next(_out_of_range(annotation, value), None)
    options = _options(annotation)
    choices = [option for option in options if isinstance(option, _LITERALS)]
    if choices and isinstance(value, str):
        near = difflib.get_close_matches(value, [c for c in choices if isinstance(c, str)], n=1)
        hint = f" Nearest: {near[0]!r}." if near else ""
        return f"cannot be {value!r}: choose from {', '.join(map(repr, choices))}.{hint}"
    kind = "a function or class" if isinstance(value, Reference) else type(value).__name__
    message = f"takes {' or '.join(map(_name, options))}, not {value!r} ({kind})"
    # A string is also a sequence, of its letters, but a single item was probably meant.
    if any(_is_list(option) and _fits(option, [value]) for option in options):
        return f"{message}: write [{value!r}]"
    return message


def _wrong_reference(annotation: Any, reference: Reference) -> str | None:
    """Returns the error of a reference of which it is certain that it gives another kind of object."""
    if reference.target is None:
        return None
    if isinstance(declaration(annotation), CalledWith):
        annotation = typing.get_args(annotation)[0]
    made = reference.target.value
    returned: Any = made if inspect.isclass(made) else hints(made).get("return")
    classes = _classes(annotation)
    wanted = f"takes an object of {' or '.join(c.__name__ for c in classes)}"
    known = classes and _is_own(returned)
    if known and not any(_may_be(returned, kind) for kind in classes):
        return f"{wanted}, not {reference!r}, which is of {returned.__name__}"
    is_function = typing.get_origin(returned) is collections.abc.Callable
    if not reference.evaluate and (classes or (is_function and returned in _parts(annotation))):
        result = wanted if classes else "takes the function that it returns"
        return f"{result}, not {reference!r} itself: write @{reference.name}()"
    if reference.evaluate and _is_result(returned, annotation):
        return f"takes the function itself, not its result {reference!r}: write @{reference.name}"
    return None


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
    parts = [part for part in _parts(annotation) if part is not type(None)]
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
    elif origin in _UNIONS:
        # A value that fits several parts needs to lie in the range of one.
        fitting = [p for p in parts if all(map(_name, _options(p))) and _fits(p, value)]
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


def _fits(annotation: Any, value: Any) -> bool:
    """Returns whether an annotation allows a value, or is none that is compared."""
    if isinstance(value, Macro) or (isinstance(value, Reference) and value.evaluate):
        return True
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _fits(parts[0], value)
    if origin in _UNIONS:
        return any(_fits(part, value) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin is collections.abc.Callable or _is_own(annotation):
        return value is None or isinstance(value, Reference)  # None may stand for none bound
    if _is_list(annotation):
        return isinstance(value, list | tuple) and all(_fits(parts[0], item) for item in value)
    if origin is collections.abc.Mapping:
        return isinstance(value, dict) and all(_fits(parts[1], item) for item in value.values())
    if annotation in (int, float):
        numbers = int if annotation is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool)
    return annotation not in _SIMPLE or isinstance(value, annotation)


def _parts(annotation: Any) -> tuple[Any, ...]:
    """Returns the parts of a union; any other annotation alone."""
    is_union = typing.get_origin(annotation) in _UNIONS
    return typing.get_args(annotation) if is_union else (annotation,)


def _options(annotation: Any) -> list[Any]:
    """Returns the literals and annotations of which an annotation allows one."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _options(parts[0])
    if origin in _UNIONS:
        return [option for part in parts for option in _options(part)]
    return list(parts) if origin is typing.Literal else [annotation]


def _name(option: Any) -> str:
    """Returns what messages call one of the options of an annotation; '' for one that is not compared."""
    origin, parts = typing.get_origin(option), typing.get_args(option)
    if isinstance(option, _LITERALS):
        return repr(option)
    if option in _SIMPLE:
        return "None" if option is type(None) else option.__name__
    if origin is collections.abc.Callable:
        return "a function, as @module.name"
    if _is_own(option):
        return f"an object of {option.__name__}, as @module.name()"
    if not _is_list(option) and origin is not collections.abc.Mapping:
        return ""
    kind, item = ("list", parts[0]) if _is_list(option) else ("dict", parts[1])
    items = [_name(one) for one in _options(item)]
    return f"a {kind} of {' or '.join(items)}" if all(items) else f"a {kind}"


def _is_list(annotation: Any) -> bool:
    """Returns whether an annotation takes lists of any length."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    return origin is collections.abc.Sequence or (origin is tuple and parts[-1] is ...)


def _is_own(item: Any) -> bool:
    return inspect.isclass(item) and item.__module__.partition(".")[0] == "espalier"


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


def passed(owner: Any, parameter: str) -> tuple[str, ...]:
    """Returns the arguments with which `owner` calls the factory in `parameter`, sorted by name.

    The calls of a base class count for its subclasses.
    """
    if isinstance(declared := declaration(hints(owner).get(parameter)), CalledWith):
        return tuple(sorted(declared.names))
    for holder in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        name = f"{holder.__module__}.{holder.__qualname__}"
        if name in _SLOTS:
            return _SLOTS[name]
        if names := PASSED.get(name, {}).get(parameter) or _calls(holder).get(parameter):
            return tuple(sorted(names))
    return ()


@functools.cache
def _calls(owner: Any) -> Mapping[str, set[str]]:
    """Returns the keywords of calls of each parameter (for a class: attribute of self) in the source of `owner`."""
    keywords: dict[str, set[str]] = {}
    for node in _call_nodes(owner):
        match node.func:
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if inspect.isclass(owner):
                pass
            case ast.Name(id=name) if not inspect.isclass(owner):
                pass
            case _:
                continue
        keywords.setdefault(name, set()).update(k.arg for k in node.keywords if k.arg)
    return keywords


def _call_nodes(owner: Any) -> list[ast.Call]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError, SyntaxError):  # builtins, and code defined at run time
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A function's call of `like` (model/like.py).

    Attributes:
      plain, made: the function's parameters with the two factories.
      classes: classes of plain modules.
      own: fields of plain modules that are not copied.
      settings: arguments that the call itself passes to `made`.
    """

    plain: str
    made: str
    classes: tuple[type, ...]
    own: tuple[str, ...]
    settings: tuple[str, ...]

    def copied(self, made: Any) -> tuple[str, ...]:
        """Returns the fields that the class `made` gets from plain modules."""
        is_module = dataclasses.is_dataclass(made) and isinstance(made, type)
        return tuple(sorted(copied(self.classes, made, self.own))) if is_module else ()


@functools.cache
def wrapper(owner: Any) -> Wrapper | None:
    """Returns the call of `like` in the source of a function; None without one."""
    names = getattr(owner, "__globals__", {})
    for node in _call_nodes(owner):
        match node:
            case ast.Call(ast.Name(name), [ast.Name(plain), ast.Name(made)]) if (
                names.get(name) is like
            ):
                keywords = {k.arg: k.value for k in node.keywords if k.arg}
                nodes = ast.walk(keywords.pop("of"))
                classes = tuple(names[x.id] for x in nodes if isinstance(x, ast.Name))
                own = ast.literal_eval(keywords.pop("own", ast.Dict([], [])))
                return Wrapper(plain, made, classes, tuple(own), tuple(keywords))
    return None
