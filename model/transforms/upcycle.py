"""Transforms dense models that were trained from one seed model to a mixture of experts.

FFNs become experts (BTX, arXiv 2403.07816), and attentions where the mixture says how. Routers are drawn. All other
parameters are the mean of the models. With a shared FFN, which every token uses, one more model has it: that model is not
an expert and not part of the means.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from espalier.model.transforms import base, experts
from espalier.model.transforms.base import Recipe, Shapes, Source, TransformError
from espalier.model.transforms.experts import ExpertAxis, Mixture


@dataclasses.dataclass(frozen=True)
class Upcycle:
    """Transforms dense models, one source per expert, to a mixture.

    Attributes:
      mixture: settings of the experts and routers.
      shared_ffn: whether there is one more source, the last, whose FFNs become the shared FFN.
    """

    mixture: Mixture
    shared_ffn: bool = False

    def plan(self, sources: Sequence[Source], target: Shapes) -> list[Recipe]:
        """See TreeTransform."""
        if len(sources) != self.mixture.experts + self.shared_ffn:
            raise TransformError(
                f"{len(sources)} models do not make {self.mixture.experts} experts."
            )
        check_alike(sources)
        dense = sources[: self.mixture.experts]
        return [self._recipe(path, tuple(shape), sources, dense) for path, shape in target.items()]

    def _recipe(
        self, path: str, shape: tuple[int, ...], sources: Sequence[Source], dense: Sequence[Source]
    ) -> Recipe:
        if self.shared_ffn and re.fullmatch(experts.SHARED, path):
            seed, source = sources[-1], path.replace("mlp/shared/", "mlp/")
            recipe = base.copied(source, seed.shape(source), seed, f"of {seed.name}")
            return dataclasses.replace(recipe, outputs={path: seed.shape(source)})
        if path not in dense[0].shapes:
            return drawn(path, shape, self.mixture)
        before = dense[0].shape(path)
        inputs = tuple((source.name, path) for source in dense)
        where = experts.expert_axis(path, self.mixture)
        if where is None:
            return single(path, before, f"mean of {len(dense)}", inputs, _mean, slices="rows")
        return _side_by_side(path, before, inputs, where, self.mixture)


def single(
    path: str,
    shape: tuple[int, ...],
    origin: str,
    inputs: tuple[tuple[str, str], ...],
    compute: Callable[[Sequence[np.ndarray], int], np.ndarray],
    *,
    slices: base.Slices = "whole",
) -> Recipe:
    """Returns the recipe of one parameter, from a function that returns one array."""
    return Recipe(
        outputs={path: shape},
        origin=origin,
        inputs=inputs,
        compute=lambda parts, index: (compute(parts, index),),
        slices=slices,
    )


def check_alike(sources: Sequence[Source]) -> None:
    """Raises TransformError unless all models have parameters with the same paths and shapes."""
    first, *rest = sources
    for other in rest:
        paths = sorted({*first.shapes, *other.shapes})
        for path in paths:
            there, here = first.shapes.get(path), other.shapes.get(path)
            if there != here:
                raise TransformError(
                    f"{other.name} does not have the seed of {first.name}: {path} is "
                    f"{list(here) if here else 'missing'}, but {list(there) if there else 'missing'} in "
                    f"{first.name}. Use models with one dense architecture."
                )


def _mean(parts: Sequence[np.ndarray], _: int) -> np.ndarray:
    return experts.mean(parts)


def _side_by_side(
    path: str,
    dense: tuple[int, ...],
    inputs: tuple[tuple[str, str], ...],
    where: ExpertAxis,
    mixture: Mixture,
) -> Recipe:
    ffn = where.axis == -3
    averaged = not ffn and mixture.attention is not None and mixture.attention.averaged

    def compute(parts: Sequence[np.ndarray], layer: int) -> np.ndarray:
        if ffn:
            parts = [experts.routed(x, path, mixture, j, layer) for j, x in enumerate(parts)]
        elif averaged:
            parts = [experts.mean(parts)] * len(parts)
        return experts.joined(parts, where)

    shape = list(dense)
    if ffn:
        shape.insert(len(dense) - 2, mixture.experts)
    else:
        shape[where.axis] *= mixture.experts
    origin = "copied, one beside the other" + changes(path, mixture)
    if averaged:
        origin = f"mean of {len(inputs)}, as often"
    return single(path, tuple(shape), origin, inputs, compute, slices=mixture.slices(path))


def changes(path: str, mixture: Mixture) -> str:
    """Returns how an expert's kernel differs from a copy, in words."""
    if not re.fullmatch(experts.FFN, path):
        return ""
    redrawn = f", {mixture.drop_ratio:g} of units redrawn" if mixture.drop_ratio else ""
    scaled = mixture.expert_scale != 1.0 and path.endswith("/down/kernel")
    return redrawn + (f", times {mixture.expert_scale:g}" if scaled else "")


def drawn(path: str, shape: tuple[int, ...], mixture: Mixture, *key: int) -> Recipe:
    """Returns the recipe of a router's parameter, which no source has; `key` adds to the mixture's seed.

    Raises:
      TransformError: the parameter is not a router's, or its embeddings do not fit.
    """
    match = re.fullmatch(experts.ROUTER, path)
    initial = None if match is None else mixture.router.initial(match[3], path, shape)
    if initial is None:
        raise TransformError(f"{path} {list(shape)} of the mixture has no source.")
    if isinstance(initial, np.ndarray):
        return single(path, shape, "embeddings", (), lambda *_: np.broadcast_to(initial, shape))
    values = lambda *_: experts.draw(path, shape, initial, mixture.seed, *key)  # noqa: E731
    return single(path, shape, "drawn", (), values)
