"""The interface of tree transforms, which compute a model's parameters from other models' parameters.

A transform needs only shapes to make its plan: a recipe for every parameter of the target. A recipe says which arrays
of which sources are read, how the values are computed, in which slices, and where they come from in words. `apply`
computes a plan in memory (INITIAL_TRANSFORM of a training run, trainers/checkpoints/initial.py).
launch/weights/transformed_run.py reads checkpoints and writes a new run, one slice at a time. `table` prints the
origin of every parameter.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from espalier.common.bars import Bar

Shapes = Mapping[str, tuple[int, ...]]  # by path, such as "layers/block_0/mlp/up/kernel"
Slices = Literal["whole", "layers", "rows"]
Power = Literal["first", "second"]


class TransformError(ValueError):
    """Parameters that a transform does not support."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to read: its name in messages and recipes, and the shapes of its parameters."""

    name: str
    shapes: Shapes

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of a parameter; raises TransformError if the source does not have it."""
        if path not in self.shapes:
            raise TransformError(
                f"{self.name} has no {path}: give the configuration that it was trained with."
            )
        return tuple(self.shapes[path])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """How one or several parameters of the target are computed; several share work, such as two factors.

    Attributes:
      outputs: shapes of the computed parameters, by path.
      inputs: (name of a source, path) of each array to read; empty if values are drawn.
      origin: where the values come from, in words: "copied", "mean of 3", "drawn".
      compute: returns one array for each output, from one array for each input and the index of the first row.
        It takes and returns numpy or JAX arrays; the executor casts to the target's dtype.
      slices: slices that `compute` accepts instead of whole arrays. "layers" is one row of the leading axis, which
        stacks layers; "rows" is any rows of the leading axis. Several outputs are always computed whole.
      abstract_inputs: returns the inputs' jax.ShapeDtypeStructs, with shardings, from the outputs'
        jax.ShapeDtypeStructs; None if inputs have the shape of the outputs.
      moments: returns an optimiser's moments of the outputs, from the moments of the inputs, the outputs and the
        averaged power of the gradient ('second': elementwise squares). None if moments cannot be transformed.
    """

    outputs: Shapes
    origin: str
    compute: Callable[[Sequence[Any], int], Sequence[Any]]
    inputs: tuple[tuple[str, str], ...] = ()
    slices: Slices = "whole"
    abstract_inputs: Callable[[Sequence[Any]], Sequence[Any]] | None = None
    moments: Callable[[Sequence[Any], Sequence[Any], Power], Sequence[Any]] | None = None

    def __post_init__(self) -> None:
        assert len(self.outputs) == 1 or self.slices == "whole", "several outputs are made whole"


class TreeTransform(Protocol):
    """Makes a plan to compute a target model's parameters from the sources' parameters."""

    def plan(self, sources: Sequence[Source], target: Shapes) -> list[Recipe]:
        """Returns the recipes of all parameters of `target`.

        Raises:
          TransformError: the sources cannot be transformed to the target.
        """
        ...


def plan(transform: TreeTransform, sources: Sequence[Source], target: Shapes) -> list[Recipe]:
    """Returns the plan of a transform.

    Raises:
      TransformError: the plan does not compute a parameter of the target, computes another shape, or
        does not use a parameter of a source.
    """
    recipes = transform.plan(sources, target)
    check_target(recipes, target)
    read = {path for recipe in recipes for _, path in recipe.inputs}
    for source in sources:
        if unused := sorted(set(source.shapes) - read - set(target)):
            raise TransformError(f"{source.name} has {unused[0]}, which the new model lacks.")
    return recipes


def check_target(recipes: Sequence[Recipe], target: Shapes) -> None:
    """Raises TransformError unless the recipes compute exactly the target's parameters, with its shapes."""
    computed = {path: tuple(shape) for recipe in recipes for path, shape in recipe.outputs.items()}
    for path in {**target, **computed}:
        here, there = computed.get(path), target.get(path)
        if here is None:
            raise TransformError(f"{path} {list(target[path])} of the new model has no source.")
        if there is None or here != tuple(there):
            raise TransformError(
                f"{path} would be {list(here)}, and the configuration of the new model has "
                f"{'none' if there is None else list(there)}: use models of equal sizes."
            )


def apply(recipes: Iterable[Recipe], read: Callable[[str, str], Any]) -> dict[str, Any]:
    """Returns all parameters by path, computed in memory; `read` returns an array of (source, path)."""
    params: dict[str, Any] = {}
    for recipe in Bar(list(recipes), desc="transform", unit="array", leave=False, delay=5):
        parts = [read(*name) for name in recipe.inputs]
        if recipe.slices == "layers":
            count = next(iter(recipe.outputs.values()))[0]
            rows = [recipe.compute([x[i : i + 1] for x in parts], i)[0] for i in range(count)]
            values: Sequence[Any] = [np.concatenate(rows)]
        else:
            values = recipe.compute(parts, 0)
        params.update(zip(recipe.outputs, values, strict=True))
    return params


def copied(path: str, shape: tuple[int, ...], source: Source, origin: str = "copied") -> Recipe:
    """Returns the recipe of a parameter that is copied from the same path of a source.

    Raises:
      TransformError: the source does not have the parameter with this shape.
    """
    if source.shape(path) != tuple(shape):
        raise TransformError(
            f"{path} is {list(source.shape(path))} in {source.name}, and {list(shape)} in the new model: use "
            "models of equal sizes."
        )
    return Recipe(
        outputs={path: tuple(shape)},
        inputs=((source.name, path),),
        origin=origin,
        compute=lambda parts, _: parts,
        slices="rows",
        moments=lambda moments, outputs, power: moments,
    )


def table(recipes: Sequence[Recipe], notes: Mapping[str, str] | None = None) -> list[str]:
    """Returns lines of a table of the parameters: path, shape, number of values, origin.

    `notes`, by path, are appended to the origins of outputs.
    """
    rows = [("path", "shape", "values", "from")]
    for recipe in recipes:
        for path, shape in recipe.outputs.items():
            sizes = " x ".join(map(str, shape))
            origin = recipe.origin + (notes or {}).get(path, "")
            rows.append((path, sizes, f"{math.prod(shape):,}", origin))
    return aligned(rows, right=(2,))


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Returns the rows of a table as lines; columns with these indices are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def not_finite(values: np.ndarray) -> str | None:
    """Returns how many values of an array of floats are not finite, in words; None if all are finite."""
    if _all_finite(values):
        return None
    bad = ~np.isfinite(values.astype(np.float64))
    nan = int(np.isnan(values.astype(np.float64)).sum())
    kinds = "NaN" if nan == bad.sum() else "infinite" if not nan else "NaN or infinite"
    return f"{int(bad.sum()):,} values of {values.size:,} that are {kinds}"


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype.itemsize != 2:
        return bool(np.isfinite(values).all())
    exponent = np.array(np.inf, values.dtype).view(
        np.uint16
    )  # all of its bits are set if a value is not finite
    return not ((values.view(np.uint16) & exponent) == exponent).any()
