"""The tree-transform seam: the parameters of one or several models in, those of another model out.

A transform plans from shapes alone. For every parameter of the target it returns a recipe: which arrays of which sources are
read, how the values are computed from them, in slices of what kind, and where they come from in words. `apply` computes a
plan in memory (INITIAL_TRANSFORM of a training run, trainers/checkpoints/transformed.py);
launch/weights/transformed_run.py computes it from checkpoints to a new run, one slice at a time. `table` says what
became of every parameter.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from tqdm.auto import tqdm

Shapes = Mapping[str, tuple[int, ...]]  # by path, as in "layers/block_0/mlp/up/kernel"
Slices = Literal["whole", "layers", "rows"]
Power = Literal["first", "second"]


class TransformError(ValueError):
    """Parameters that cannot be transformed as asked."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that is read: what messages and recipes call it, and the shapes of its parameters."""

    name: str
    shapes: Shapes

    def shape(self, path: str) -> tuple[int, ...]:
        """Raises TransformError for a path that the source does not have."""
        if path not in self.shapes:
            raise TransformError(
                f"{self.name} has no {path}: is it of another model than its configuration says?"
            )
        return tuple(self.shapes[path])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """How one parameter of the target is computed, or several that share the work, such as two factors.

    Attributes:
      outputs: shapes of the parameters, by path.
      inputs: (name of a source, path) of each array that is read; none where values are drawn.
      origin: where the values come from, for people: "copied", "mean of 3", "drawn".
      compute: returns one array for each output, from one array for each input and the index of the first row.
        It takes and returns numpy or JAX arrays; the executor casts to the target's dtype.
      slices: what `compute` accepts in place of whole arrays: "layers", single rows of the leading axis, which stacks
        layers, or "rows", any rows of the leading axis. Several outputs are always computed whole.
      abstract_inputs: returns jax.ShapeDtypeStructs with shardings of the inputs, from such of the outputs; None
        where inputs have the outputs' shape.
      moments: returns an optimiser's moments of the outputs from those of the inputs, the outputs themselves and the
        power of the gradient that is averaged ('second': elementwise squares); None where they have no image.
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
    """Plans the parameters of a target model from those of sources."""

    def plan(self, sources: Sequence[Source], target: Shapes) -> list[Recipe]:
        """Recipes of all parameters of `target`.

        Raises:
          TransformError: sources that cannot be transformed to it.
        """
        ...


def plan(transform: TreeTransform, sources: Sequence[Source], target: Shapes) -> list[Recipe]:
    """The plan of a transform, checked: it explains every parameter of the target and of the sources.

    Raises:
      TransformError: a parameter that is not explained or has another shape, by name.
    """
    recipes = transform.plan(sources, target)
    check_target(recipes, target)
    read = {path for recipe in recipes for _, path in recipe.inputs}
    for source in sources:
        if unused := sorted(set(source.shapes) - read - set(target)):
            raise TransformError(f"the new model has no place for {unused[0]} of {source.name}.")
    return recipes


def check_target(recipes: Sequence[Recipe], target: Shapes) -> None:
    """Raises TransformError unless the recipes compute the target's parameters, in its shapes, and no others."""
    made = {path: tuple(shape) for recipe in recipes for path, shape in recipe.outputs.items()}
    for path in {**target, **made}:
        here, there = made.get(path), target.get(path)
        if here is None:
            raise TransformError(f"nothing explains {path} {list(target[path])} of the new model.")
        if there is None or here != tuple(there):
            raise TransformError(
                f"{path} would be {list(here)}, and the configuration of the new model has "
                f"{'none' if there is None else list(there)}: do the models have other sizes?"
            )


def apply(recipes: Iterable[Recipe], read: Callable[[str, str], Any]) -> dict[str, Any]:
    """All parameters by path, computed in memory.

    Args:
      recipes: of a plan.
      read: returns an array of a source: of its name and the path.
    """
    made: dict[str, Any] = {}
    for recipe in tqdm(list(recipes), desc="transform", unit="array", leave=False, delay=5):
        parts = [read(*name) for name in recipe.inputs]
        if recipe.slices == "layers":
            count = next(iter(recipe.outputs.values()))[0]
            rows = [recipe.compute([x[i : i + 1] for x in parts], i)[0] for i in range(count)]
            values: Sequence[Any] = [np.concatenate(rows)]
        else:
            values = recipe.compute(parts, 0)
        made.update(zip(recipe.outputs, values, strict=True))
    return made


def copied(path: str, shape: tuple[int, ...], source: Source, origin: str = "copied") -> Recipe:
    """The recipe of a parameter that equals a source's, under its own path.

    Raises:
      TransformError: the source has no such parameter, or one of another shape.
    """
    if source.shape(path) != tuple(shape):
        raise TransformError(
            f"{path} is {list(source.shape(path))} in {source.name}, and {list(shape)} in the new model: do "
            "the models have other sizes?"
        )
    return Recipe(
        outputs={path: tuple(shape)},
        inputs=((source.name, path),),
        origin=origin,
        compute=lambda parts, _: parts,
        slices="rows",
        moments=lambda moments, outputs, power: moments,
    )


def chain(first: Sequence[Recipe], second: Sequence[Recipe]) -> list[Recipe]:
    """The plan that computes `second` from the sources of `first`, whose outputs are the one source of `second`.

    No array between the two is written; one that several recipes of `second` read is computed for each.
    """
    by_path = {path: recipe for recipe in first for path in recipe.outputs}

    def joined(last: Recipe) -> Recipe:
        before = [by_path[path] for _, path in last.inputs]

        def compute(parts: Sequence[Any], index: int) -> Sequence[Any]:
            inputs, rest = [], list(parts)
            for recipe, (_, path) in zip(before, last.inputs, strict=True):
                own, rest = rest[: len(recipe.inputs)], rest[len(recipe.inputs) :]
                inputs.append(recipe.compute(own, index)[list(recipe.outputs).index(path)])
            return last.compute(inputs, index)

        kinds = {last.slices, *(recipe.slices for recipe in before)}
        origins = dict.fromkeys([*(recipe.origin for recipe in before), last.origin])
        return Recipe(
            outputs=last.outputs,
            inputs=tuple(name for recipe in before for name in recipe.inputs),
            origin=", then ".join(origins),
            compute=compute,
            slices=next(kind for kind in ("whole", "layers", "rows") if kind in kinds),
        )

    return [joined(recipe) for recipe in second]


def table(recipes: Sequence[Recipe], notes: Mapping[str, str] | None = None) -> list[str]:
    """What became of each parameter, as lines: path, shape, number of values, origin.

    Args:
      recipes: of a plan.
      notes: more to say of some outputs, by path, that is known once they are computed.
    """
    rows = [("path", "shape", "values", "from")]
    for recipe in recipes:
        for path, shape in recipe.outputs.items():
            sizes = " x ".join(map(str, shape))
            origin = recipe.origin + (notes or {}).get(path, "")
            rows.append((path, sizes, f"{math.prod(shape):,}", origin))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    just = (str.ljust, str.ljust, str.rjust, str.ljust)
    return [
        "  ".join(f(cell, w) for f, cell, w in zip(just, row, widths, strict=True)).rstrip()
        for row in rows
    ]
