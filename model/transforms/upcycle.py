"""Transforms dense models that were trained from one seed model to a mixture of experts.

FFNs become experts (BTX, arXiv 2403.07816); with a mixture of attention, so do attentions (BAM, arXiv 2408.08274).
Routers are drawn. All other parameters are the mean of the models. With Nexus (arXiv 2408.15901) the seed model is not
an expert and not part of the means: its FFNs become the shared FFN, which every token uses.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from espalier.model.moe import router_scale
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
    averaged = mixture.average_attention and not ffn

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
      TransformError: the parameter is not a router's, or the domains' embeddings do not fit.
    """
    match = re.fullmatch(experts.ROUTER, path)
    if match is None:
        raise TransformError(f"{path} {list(shape)} of the mixture has no source.")
    if match[3] == "domains":
        if (domains := mixture.domains) is None:
            raise TransformError(f"{path} of the mixture needs embeddings of domains.")
        if domains.shape != shape[-2:]:
            raise TransformError(
                f"{path} of the mixture is {list(shape)}, and embeddings are {list(domains.shape)}: "
                "set DomainRouter.domain_dim to their width."
            )
        return single(path, shape, "embeddings", (), lambda *_: np.broadcast_to(domains, shape))
    std = _std(match[3], shape, mixture)
    values = lambda *_: experts.draw(path, shape, std, mixture.seed, *key)  # noqa: E731
    return single(path, shape, "drawn", (), values)


def _std(kind: str, shape: tuple[int, ...], mixture: Mixture) -> float:
    """Returns the initial standard deviation of a router's kernel [..., in, out]."""
    fan_in, width = shape[-2:]
    if kind == "kernel":
        return mixture.router_std
    if kind != "down/kernel":
        return 1 / math.sqrt(fan_in)
    if mixture.domains is not None:
        # Rounded: float32 vectors have length 1 only nearly.
        length = round(float(np.linalg.norm(mixture.domains, axis=-1).mean()), 3)
        return router_scale.down_std(mixture.domains.shape[-1], width, mixture.logit_std, length)
    return router_scale.token_down_std(fan_in, mixture.logit_std)
