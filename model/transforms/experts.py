"""Transforms dense models that were trained from one seed model to a mixture of experts, in numpy; exact except for averages.

FFNs become experts (BTX, arXiv 2403.07816), and attentions where the mixture says how. Routers are drawn. All other
parameters are the mean of the models. With a shared FFN, which every token uses, one more model has it: that model is not
an expert and not part of the means.

Shapes: E experts, D width, F hidden width, '...' stacked layers.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from espalier.model import layer_groups
from espalier.model.transforms import base
from espalier.model.transforms.base import Recipe, Shapes, Source, TransformError

FFN = r"(.*/)?mlp/(gate|up|down)/kernel"
SHARED = r"(.*/)?mlp/shared/(gate|up|down)/kernel"
ROUTER = r"(.*/)?(mlp|attention)/router/((?!bias$).+)"  # with the parameter's name in its router
CHOICE_BIAS = r"(.*/)?mlp/choice_bias"  # model/moe/routing.py


@dataclasses.dataclass(frozen=True)
class ExpertAxis:
    """The axis of an array along which experts are concatenated.

    Attributes:
      axis: index of the axis, counted from the end of the shape.
      groups: number of equal parts of the axis; each has a part of every expert.
    """

    axis: int
    groups: int = 1


class AttentionExperts(Protocol):
    """How attentions are experts.

    Attributes:
      averaged: whether each expert is the mean of all models: a control with the same number of parameters and no
        specialisation.
    """

    averaged: bool

    def axis(self, path: str) -> ExpertAxis | None:
        """Returns the expert axis of a parameter of the mixture; None for parameters that are shared, or no attention's."""


class Routers(Protocol):
    """The routers of a mixture, such as `LinearRouters`."""

    def axis(self, name: str) -> int | None:
        """Returns the expert axis of a router's parameter `name`, counted from the end; None for one without."""

    def initial(self, name: str, path: str, shape: tuple[int, ...]) -> float | np.ndarray | None:
        """Returns the standard deviation of a parameter's first values, or its embeddings; None if routers have no such one.

        Raises:
          TransformError: embeddings that do not fit.
        """

    def of_last(self) -> "Routers":
        """Returns routers that describe the last expert alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRouters:
    """Routers with a kernel [D, E], drawn with the standard deviation `std`."""

    std: float = 0.02

    def axis(self, name: str) -> int | None:
        return -1 if name == "kernel" else None

    def initial(self, name: str, path: str, shape: tuple[int, ...]) -> float | None:
        del path, shape
        return self.std if name == "kernel" else None

    def of_last(self) -> "LinearRouters":
        return self


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """Settings of a mixture that its parameters depend on.

    Attributes:
      experts: E, the number of FFN experts and of attention experts, without the shared FFN.
      scanned: whether arrays below `layers/` stack layers on their leading axis.
      ffn: whether FFNs are experts; if not, the mixture is a dense model whose parameters are means.
      attention: how attentions are experts too; None if they are not.
      router: the routers.
      seed: seed of the routers' initial values.
      expert_scale: factor on the down-projections of routed experts. If weights are probabilities that are not
        renormalised, N copies of one FFN give about 1/N of its output; a factor of N corrects this
        (arXiv 2410.07524).
      drop_ratio: fraction of the hidden units of each routed expert that is redrawn, see `dropped`.
      drop_seed: seed of the redrawn values.
      granularity: m, in how many parts the FFN of each expert is split (arXiv 2410.07524). Parts have equal columns in
        their router, so that a token first gets all parts of an expert, each with 1/m of its probability; their
        down-projections are multiplied by m. The mixture then computes what that of whole experts computes.
    """

    experts: int
    scanned: bool = False
    ffn: bool = True
    attention: AttentionExperts | None = None
    router: Routers = LinearRouters()
    seed: int = 0
    expert_scale: float = 1.0
    drop_ratio: float = 0.0
    drop_seed: int = 0
    granularity: int = 1

    @property
    def down_scale(self) -> float:
        """Factor on the down-projections of routed experts."""
        return self.expert_scale * self.granularity

    def slices(self, path: str) -> Literal["layers", "whole"]:
        """Returns the slices of an experts' array's recipe: "layers" if layers are stacked. See base.Recipe."""
        return "layers" if self.scanned and layer_groups.BLOCK.fullmatch(path) else "whole"


def expert_axis(path: str, shape: Sequence[int], mixture: Mixture) -> ExpertAxis | None:
    """Returns the expert axis of a parameter of the mixture; None for parameters that experts share.

    Args:
      path: path of the parameter.
      shape: its shape in the mixture, in which some layers may have one dense FFN.
      mixture: settings of the mixture.
    """
    if re.fullmatch(FFN, path):
        dense = 2 + (mixture.slices(path) == "layers")
        return ExpertAxis(-3) if mixture.ffn and len(shape) > dense else None
    if match := re.fullmatch(ROUTER, path):
        axis = mixture.router.axis(match[3])
        return None if axis is None else ExpertAxis(axis)
    if re.fullmatch(CHOICE_BIAS, path):
        return ExpertAxis(-1)
    return None if mixture.attention is None else mixture.attention.axis(path)


def joined(parts: Sequence[np.ndarray], where: ExpertAxis) -> np.ndarray:
    """Returns one array of all experts, from arrays of one or several experts each."""
    split = [_last(part, where.axis) for part in parts]
    split = [part.reshape(*part.shape[:-1], where.groups, -1) for part in split]
    whole = np.concatenate(split, axis=-1)
    return np.moveaxis(whole.reshape(*whole.shape[:-2], -1), -1, where.axis)


def without(array: np.ndarray, where: ExpertAxis, expert: int, experts: int) -> np.ndarray:
    """Returns an array of `experts` experts without the expert of index `expert`."""
    split = _last(array, where.axis)
    split = split.reshape(*split.shape[:-1], where.groups, experts, -1)
    rest = np.delete(split, expert, axis=-2)
    return np.moveaxis(rest.reshape(*rest.shape[:-3], -1), -1, where.axis)


def _last(array: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(array, axis, -1)


def mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the uniform mean, computed in float32."""
    total = np.zeros(parts[0].shape, np.float32)
    for part in parts:
        total += part.astype(np.float32)
    return total / np.float32(len(parts))


def routed(kernel: np.ndarray, path: str, mixture: Mixture, expert: int, layer: int) -> np.ndarray:
    """Returns a routed expert's kernel [..., m, X, Y], in m parts, from a dense model's [..., X, Y] of one layer."""
    kernel = dropped(kernel, path, mixture, expert, layer)
    if mixture.down_scale != 1.0 and path.endswith("/down/kernel"):
        kernel = (kernel.astype(np.float32) * np.float32(mixture.down_scale)).astype(kernel.dtype)
    return np.stack(np.split(kernel, mixture.granularity, axis=_hidden_axis(path)), axis=-3)


def _hidden_axis(path: str) -> int:
    """Returns the axis of the hidden units of an FFN's kernel."""
    return -2 if path.endswith("/down/kernel") else -1


def dropped(kernel: np.ndarray, path: str, mixture: Mixture, expert: int, layer: int) -> np.ndarray:
    """Returns an expert's kernel with some hidden units redrawn (Drop-Upcycling, arXiv 2502.19261, section 3).

    In each expert and layer, a random set S of floor(R F) of the F hidden units is dropped. S is the same in the
    expert's three matrices: columns of `gate` and `up`, rows of `down`. In each matrix the entries of S are replaced
    by draws from a normal distribution with the mean and standard deviation of these entries.

    Args:
      kernel: one layer's kernel [..., D, F], or [..., F, D] for `down`.
      path: path of the kernel in the mixture.
      mixture: settings; its drop_ratio is R.
      expert: index of the expert.
      layer: index in the stack of layers under this path.
    """
    axis = _hidden_axis(path)
    # In floating point, R * F may be slightly below an integer.
    count = int(mixture.drop_ratio * kernel.shape[axis] + 1e-9)
    if count == 0:
        return kernel
    owner, name = path.removesuffix("/kernel").rsplit("/", 1)
    key = [mixture.drop_seed, zlib.crc32(owner.encode()), layer, expert]
    units = np.random.default_rng(key).choice(kernel.shape[axis], count, replace=False)
    out = np.moveaxis(kernel.copy(), axis, -1)
    old = out[..., units].astype(np.float32)
    rng = np.random.default_rng([*key, zlib.crc32(name.encode())])
    out[..., units] = rng.normal(old.mean(), old.std(), old.shape).astype(kernel.dtype)
    return np.moveaxis(out, -1, axis)


def draw(path: str, shape: tuple[int, ...], std: float, *key: int) -> np.ndarray:
    """Returns normal values that depend only on path and key, not on other draws."""
    rng = np.random.default_rng([*key, zlib.crc32(path.encode())])
    return (std * rng.normal(size=shape)).astype(np.float32)


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
        if self.shared_ffn and re.fullmatch(SHARED, path):
            seed, source = sources[-1], path.replace("mlp/shared/", "mlp/")
            recipe = base.copied(source, seed.shape(source), seed, f"of {seed.name}")
            return dataclasses.replace(recipe, outputs={path: seed.shape(source)})
        if path not in dense[0].shapes:
            return drawn(path, shape, self.mixture)
        before = dense[0].shape(path)
        inputs = tuple((source.name, path) for source in dense)
        where = expert_axis(path, shape, self.mixture)
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
    return mean(parts)


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
            parts = [routed(x, path, mixture, j, layer) for j, x in enumerate(parts)]
        elif averaged:
            parts = [mean(parts)] * len(parts)
        return joined(parts, where)

    shape = list(dense)
    if ffn:
        hidden, parts = _hidden_axis(path), mixture.granularity
        if shape[hidden] % parts:
            raise TransformError(
                f"{path} has {shape[hidden]} hidden units, which {parts} parts do not divide."
            )
        shape[hidden] //= parts
        shape.insert(len(dense) - 2, mixture.experts * parts)
    else:
        shape[where.axis] *= mixture.experts
    origin = "copied, one beside the other" + changes(path, mixture)
    if averaged:
        origin = f"mean of {len(inputs)}, as often"
    return single(path, tuple(shape), origin, inputs, compute, slices=mixture.slices(path))


def changes(path: str, mixture: Mixture) -> str:
    """Returns how an expert's kernel differs from a copy, in words."""
    if not re.fullmatch(FFN, path):
        return ""
    redrawn = f", {mixture.drop_ratio:g} of units redrawn" if mixture.drop_ratio else ""
    split = f", each in {mixture.granularity} parts" if mixture.granularity > 1 else ""
    scaled = mixture.down_scale != 1.0 and path.endswith("/down/kernel")
    return redrawn + split + (f", times {mixture.down_scale:g}" if scaled else "")


def drawn(path: str, shape: tuple[int, ...], mixture: Mixture, *key: int) -> Recipe:
    """Returns the recipe of a router's parameter, which no source has; `key` adds to the mixture's seed.

    Raises:
      TransformError: the parameter is not a router's, or its embeddings do not fit.
    """
    match = re.fullmatch(ROUTER, path)
    initial = None if match is None else mixture.router.initial(match[3], path, shape)
    if initial is None:
        raise TransformError(f"{path} {list(shape)} of the mixture has no source.")
    if isinstance(initial, np.ndarray):
        return single(path, shape, "embeddings", (), lambda *_: np.broadcast_to(initial, shape))
    axis = mixture.router.axis(match[3]) if match and match[2] == "mlp" else None
    parts = 1 if axis is None else mixture.granularity

    def values(*_: Any) -> np.ndarray:
        whole = [*shape]
        if axis is not None:
            whole[axis] //= parts
        drawn = draw(path, tuple(whole), initial, mixture.seed, *key)
        return drawn if parts == 1 else np.repeat(drawn, parts, axis)

    return single(path, shape, "drawn" + (f", {parts} times" if parts > 1 else ""), (), values)
