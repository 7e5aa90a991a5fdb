"""Adds an expert to a mixture or removes one (Nexus, arXiv 2408.15901).

The new expert is appended: its FFN, and its attention if attentions are experts. A projection router is not changed,
and the embedding of the new expert's data is appended; other routers get a random column. A bias that balances experts
begins as the mean of the others'. Parameters that experts share are interpolated towards the new model, except the
shared FFN. Removal deletes the expert's parameters.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from espalier.model.transforms import base, experts
from espalier.model.transforms.base import Recipe, Shapes, Source, TransformError
from espalier.model.transforms.experts import ExpertAxis, Mixture


@dataclasses.dataclass(frozen=True)
class Addition:
    """Transforms a mixture and a dense model (the two sources) to a mixture with one more expert.

    Attributes:
      mixture: settings of the larger mixture.
      merge: weight of the new model in parameters that experts share. 1 / (E + 1) turns a mean of E models into a
        mean of E + 1 models; 0 leaves these parameters unchanged.
      router: for routers that are not projections: 'append' draws the new expert's column, 'reset' draws the whole
        router, whose biases then begin with 0.
    """

    mixture: Mixture
    merge: float
    router: Literal["append", "reset"] = "append"

    def plan(self, sources: Sequence[Source], target: Shapes) -> list[Recipe]:
        """See TreeTransform."""
        old, new = sources
        return [self._recipe(path, tuple(shape), old, new) for path, shape in target.items()]

    def _recipe(self, path: str, shape: tuple[int, ...], old: Source, new: Source) -> Recipe:
        mixture = self.mixture
        router = re.fullmatch(experts.ROUTER, path) is not None
        where = experts.expert_axis(path, shape, mixture)
        bias = re.fullmatch(experts.CHOICE_BIAS, path) is not None
        if router and self.router == "reset":
            return experts.drawn(path, shape, mixture, mixture.experts)
        if bias and self.router == "reset":
            return experts.single(
                path, shape, "0, as the router is new", (), lambda *_: np.zeros(shape)
            )
        if where is None:
            if router or re.fullmatch(experts.SHARED, path) or not self.merge:
                return base.copied(path, old.shape(path), old)
            return _merged(path, old, new, self.merge)
        before = old.shape(path)
        one = _resized(before, where, before[where.axis] // (mixture.experts - 1))
        if router:
            last = dataclasses.replace(mixture, router=mixture.router.of_last())
            column = experts.drawn(path, one, last, mixture.experts)
            origin = column.origin
            inputs: tuple[tuple[str, str], ...] = ((old.name, path),)

            def added(parts: Sequence[np.ndarray], layer: int) -> np.ndarray:
                (drawn,) = column.compute([], 0)
                # `drawn` has all stacked layers.
                return drawn if len(drawn) == len(parts[0]) else drawn[layer : layer + 1]

        elif bias:
            # Only differences of biases matter: the mean neither favours the new expert nor hides it.
            origin, inputs = "the mean of the others", ((old.name, path),)

            def added(parts: Sequence[np.ndarray], layer: int) -> np.ndarray:
                del layer
                return parts[0].mean(-1, keepdims=True)

        else:
            _check_expert(path, one, where, old, new)
            origin = f"copied{experts.changes(path, mixture)}"
            inputs = ((old.name, path), (new.name, path))

            def added(parts: Sequence[np.ndarray], layer: int) -> np.ndarray:
                if where.axis != -3:
                    return parts[1]
                return experts.routed(parts[1], path, mixture, mixture.experts - 1, layer)

        def compute(parts: Sequence[np.ndarray], layer: int) -> np.ndarray:
            return experts.joined([parts[0], added(parts, layer).astype(parts[0].dtype)], where)

        after = _resized(before, where, before[where.axis] + one[where.axis])
        slices = mixture.slices(path)
        return experts.single(path, after, f"one more, {origin}", inputs, compute, slices=slices)


@dataclasses.dataclass(frozen=True)
class Removal:
    """Transforms a mixture (the only source) to the mixture without the expert of index `expert`."""

    mixture: Mixture
    expert: int

    def plan(self, sources: Sequence[Source], target: Shapes) -> list[Recipe]:
        """See TreeTransform."""
        (old,) = sources
        return [self._recipe(path, old) for path in target]

    def _recipe(self, path: str, old: Source) -> Recipe:
        before, count = old.shape(path), self.mixture.experts
        where = experts.expert_axis(path, before, self.mixture)
        if where is None:
            return base.copied(path, before, old)

        def compute(parts: Sequence[np.ndarray], _: int) -> np.ndarray:
            return experts.without(parts[0], where, self.expert, count)

        after = _resized(before, where, before[where.axis] // count * (count - 1))
        slices = self.mixture.slices(path)
        return experts.single(
            path, after, "without one", ((old.name, path),), compute, slices=slices
        )


def _check_expert(
    path: str, one: tuple[int, ...], where: ExpertAxis, old: Source, new: Source
) -> None:
    """Raises TransformError unless the new model's array has the shape `one` of an expert."""
    dense = (*one[:-3], *one[-2:]) if where.axis == -3 else one
    if (shape := new.shapes.get(path)) != dense:
        raise TransformError(
            f"{new.name} does not have the seed of {old.name}: {path} is "
            f"{list(shape) if shape else 'missing'}, but {list(dense)} in an expert."
        )


def _merged(path: str, old: Source, new: Source, merge: float) -> Recipe:
    if (shape := new.shape(path)) != old.shape(path):
        raise TransformError(
            f"{path} is {list(shape)} in {new.name}, and {list(old.shape(path))} in {old.name}."
        )

    def compute(parts: Sequence[np.ndarray], _: int) -> np.ndarray:
        there, here = (part.astype(np.float32) for part in parts)
        return np.float32(1 - merge) * there + np.float32(merge) * here

    origin = f"{1 - merge:.3g} of the mixture, {merge:.3g} of the new model"
    inputs = ((old.name, path), (new.name, path))
    return experts.single(path, old.shape(path), origin, inputs, compute, slices="rows")


def _resized(shape: tuple[int, ...], where: ExpertAxis, size: int) -> tuple[int, ...]:
    """Returns the shape with another size of the expert axis."""
    return (*shape[: where.axis], size, *shape[len(shape) + where.axis + 1 :])
