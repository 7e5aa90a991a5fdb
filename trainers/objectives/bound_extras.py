"""Binds the extras of an objective, such as reference parameters, to the compiled functions that take them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from espalier.model.axes import Rules
from espalier.trainers.objectives.base import Objective


@dataclasses.dataclass(frozen=True, eq=False)
class _WithExtras:
    """A jitted function with its keyword `extras` bound: arrays in calls, shapes ahead of time."""

    jitted: Any
    abstract: Any
    read: Callable[[], Any]

    def __call__(self, *args: Any) -> Any:
        return self.jitted(*args, extras=self.read())

    def lower(self, *args: Any) -> Any:
        return self.jitted.lower(*args, extras=self.abstract)

    def trace(self, *args: Any) -> Any:
        return self.jitted.trace(*args, extras=self.abstract)


def binder(objective: Objective, mesh: Mesh, rules: Rules) -> Callable[[Any], Any]:
    """Returns a function that binds the objective's extras to jitted functions; all of them share one copy."""
    stored = objective.stored_extras
    if stored is None:
        return lambda jitted: jitted
    read = functools.cache(lambda: stored.read(mesh, rules))  # at the first call
    return functools.partial(_WithExtras, abstract=stored.abstract(mesh, rules), read=read)
