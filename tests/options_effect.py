"""What an option changes: programs, shapes and values with another value of one parameter, compared as texts."""

import collections.abc
import dataclasses
import hashlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

# An option of which another value is refused has an effect too.
REFUSALS = (ValueError, FlaxError)
_OF_FLAX = ("name", "parent")
_COLLECTIONS = ["losses", "metrics", "batch_stats"]


def parameters(target: Callable) -> dict[str, Any]:
    """Returns the parameters that gin can bind, with their defaults."""
    if inspect.isclass(target) and dataclasses.is_dataclass(target):
        fields = [f for f in dataclasses.fields(target) if f.init and f.name not in _OF_FLAX]
        return {field.name: field.default for field in fields}
    if inspect.isclass(target):
        holders = (c for c in inspect.getmro(target) if "__init__" in vars(c) and c is not object)
        target = getattr(next(holders, None), "__init__", lambda: None)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    every = inspect.signature(target).parameters.values()
    return {p.name: p.default for p in every if p.kind in named and p.name != "self"}


def called(*_: Any, **__: Any) -> Any:
    """Stands for any function: that it is called at all is its effect."""
    raise ValueError("called")


def others(target: Callable, name: str, default: Any) -> Iterator[Any]:
    """Yields other values of a parameter, by its annotation; a value of a wrong kind would be an error of this test."""
    kinds = list(_kinds(_annotation(target, name)))
    if choices := [
        x for kind in kinds if _origin(kind) is typing.Literal for x in typing.get_args(kind)
    ]:
        yield from (choice for choice in choices if choice != default)
    elif bool in kinds:
        yield not default
    elif jnp.dtype in kinds or name.endswith("dtype"):
        yield jnp.bfloat16 if jnp.dtype in kinds else "bfloat16"
    elif int in kinds:
        yield from (1, 2) if default is None else (default + 1, default * 2, max(default - 1, 1))
    elif float in kinds:
        yield from (0.5, 2.0) if default is None else (default / 2 + 0.25, default + 1)
    elif any(_origin(kind) is collections.abc.Callable for kind in kinds):
        yield called
    else:
        raise NotImplementedError(f"{target.__qualname__}.{name} = {default!r}: give another value")


def _annotation(target: Callable, name: str) -> Any:
    for holder in inspect.getmro(target) if inspect.isclass(target) else (target,):
        if name in getattr(holder, "__annotations__", {}):
            return typing.get_type_hints(holder, include_extras=False)[name]
    return typing.get_type_hints(target.__init__)[name]


def _origin(kind: Any) -> Any:
    return collections.abc.Callable if kind is collections.abc.Callable else typing.get_origin(kind)


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yields the types of a union."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            yield from _kinds(option)
    else:
        yield annotation


def without_effect(
    target: Callable,
    fingerprint: Callable[..., str],
    *,
    base: Mapping[str, Any],
    values: Mapping[str, Sequence[Any]],
    passed: Sequence[str] = (),
) -> list[str]:
    """Returns the parameters of `target` of which no other value changes the fingerprint.

    Args:
      target: a class or function.
      fingerprint: called with parameters; returns a text.
      base: the parameters of the first text, where they are not the defaults.
      values: other values of parameters, in place of `others`.
      passed: parameters that are not tried, because every caller passes them.
    """
    plain, dead = fingerprint(**base), []
    for name, default in {**parameters(target), **base}.items():
        if name in passed:
            continue
        for value in values.get(name) or others(target, name, default):
            try:
                changed = fingerprint(**{**base, name: value}) != plain
            except REFUSALS:
                changed = True
            if changed:
                break
        else:
            dead.append(name)
    return dead


def traced(function: Callable, *arguments: Any) -> str:
    """Returns the text of a function's program, with a digest of its constants."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    consts = [np.asarray(x).tobytes() for x in closed.consts]
    text = re.sub(r"0x[0-9a-f]+", "", f"{closed.jaxpr}\n{shapes}")
    return f"{text}\n{hashlib.sha256(b''.join(consts)).hexdigest()}"


def of_module(module: nn.Module, *arguments: Any, **keywords: Any) -> str:
    """Returns the texts of a module's initialisation, with the axes of its parameters, and of its call in training."""
    keys = {name: jax.random.key(i) for i, name in enumerate(("params", "dropout"))}

    def init(keys: Any, *arguments: Any) -> Any:
        return module.init(keys, *arguments, **keywords)

    def call(keys: Any, variables: Any, *arguments: Any) -> Any:
        return module.apply(variables, *arguments, **keywords, rngs=keys, mutable=_COLLECTIONS)

    boxed = jax.eval_shape(init, keys, *arguments)
    program = traced(call, keys, nn.meta.unbox(boxed), *arguments)
    return f"{traced(init, keys, *arguments)}\n{boxed}\n{program}"
