"""The methods of merging models: their parameters, and their computation for one tensor."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from espalier.model.transforms import merge_blocks, merge_deltas, merge_spherical
from espalier.model.transforms.merge_blocks import Blocks, Parts
from espalier.model.transforms.merge_deltas import Compute, Kind

Values = Mapping[
    str, Any
]  # by parameter: a number, or a list with one for each model that has the parameter


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a method.

    Attributes:
      kind: float, int or bool.
      default: value if it is not set; `...` if it must be set.
      each: whether every model has its own value, and not the tensor one for all.
      low, high: bounds that values of merges which make sense have; None for none.
    """

    kind: type
    default: Any = ...
    each: bool = False
    low: float | None = None
    high: float | None = None

    def check(self, value: Any) -> str | None:
        """Returns the condition that a value breaks, such as 'a number'; None if it is right."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind is bool:
            return None if isinstance(value, bool) else "true or false"
        if not number or not np.isfinite(value) or (self.kind is int and value != int(value)):
            return "a whole number" if self.kind is int else "a number"
        if (self.low is not None and value < self.low) or (
            self.high is not None and value > self.high
        ):
            high = "" if self.high is None else f" and at most {self.high:g}"
            return f"at least {self.low:g}{high}"
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of the models to merge.

    Attributes:
      blocks: the inputs; the base is the first, if the method has one.
      based: whether the first input is a base.
      values: the method's parameters.
      keys: of each model but the base, for random numbers.
      name: for messages.
    """

    blocks: Blocks
    based: bool
    values: Values
    keys: Sequence[str]
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way to merge models.

    Attributes:
      compute: returns the function that merges a grain, after the passes that the method needs.
      parameters: by name.
      base: whether one model is the base: "needed" or "possible"; "config" if base_model only gives config and tokenizer,
        and is merged if it is among the models.
      least, most: number of models besides the base.
      rows: returns whether the method works on rows, from its parameters.
      random: whether it draws random numbers.
    """

    compute: Callable[[Tensor], Compute]
    parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)
    base: Literal["needed", "possible", "config"] = "needed"
    least: int = 1
    most: int | None = None
    rows: Callable[[Values], bool] = lambda values: False
    random: bool = False


def _combined(coefficients: Sequence[Any] | np.ndarray, work: np.dtype) -> Compute:
    """Returns the function that sums the inputs with coefficients."""
    factors = [work.type(c) for c in coefficients]

    def compute(parts: Parts, low: int) -> np.ndarray:
        result = parts[0] * factors[0]
        for part, factor in zip(parts[1:], factors[1:], strict=True):
            result += part * factor
        return result

    return compute


def _combined_deltas(coefficients: Sequence[Any] | np.ndarray, work: np.dtype) -> Compute:
    inner = _combined(coefficients, work)

    def compute(parts: Parts, low: int) -> np.ndarray:
        result = inner(merge_deltas.deltas_of(parts), low)
        result += parts[0]
        return result

    return compute


def _vectors(tensor: Tensor) -> Callable[[Parts], Parts]:
    return merge_deltas.deltas_of if tensor.based else lambda parts: parts


def _of_vectors(tensor: Tensor, coefficients: Sequence[Any] | np.ndarray) -> Compute:
    combine = _combined_deltas if tensor.based else _combined
    return combine(coefficients, tensor.blocks.work)


def _linear(tensor: Tensor) -> Compute:
    weights, work = (
        [tensor.blocks.work.type(w) for w in tensor.values["weight"]],
        tensor.blocks.work,
    )
    total = sum(tensor.values["weight"])
    divides = tensor.values["normalize"]
    summed = _combined(weights, work)

    def compute(parts: Parts, low: int) -> np.ndarray:
        result = summed(parts, low)
        if divides:
            result /= work.type(total)
        return result

    return compute


def _slerp(tensor: Tensor) -> Compute:
    products = tensor.blocks.products(lambda parts: parts)
    return _combined(merge_spherical.slerp(products, tensor.values["t"]), tensor.blocks.work)


def _nuslerp(tensor: Tensor) -> Compute:
    weights, vectors = tensor.values["weight"], _vectors(tensor)
    shape, blocks = tensor.blocks.shape, tensor.blocks
    if tensor.values["nuslerp_flatten"] or not shape:
        return _of_vectors(tensor, merge_spherical.nuslerp(blocks.products(vectors), weights))
    if tensor.values["nuslerp_row_wise"] and len(shape) > 1:
        width = blocks.size // shape[0]

        def columns(parts: Parts, _: int) -> np.ndarray:
            tall = [np.ascontiguousarray(x.reshape(-1, width).T) for x in vectors(parts)]
            return merge_blocks.products(tall)

        coefficients = merge_spherical.nuslerp(blocks.sum(columns), weights)
        return _by_group(tensor, lambda _: coefficients[:, None, :], width)

    width = shape[-1]

    def rows(wide: Parts) -> np.ndarray:
        return merge_spherical.nuslerp(merge_blocks.products(wide), weights)[..., None]

    return _by_group(tensor, rows, width)


def _by_group(tensor: Tensor, coefficients: Callable[[Parts], np.ndarray], width: int) -> Compute:
    """Returns the function that sums rows of `width` values with coefficients of the rows or of the columns."""
    vectors = _vectors(tensor)

    def compute(parts: Parts, low: int) -> np.ndarray:
        wide = [x.reshape(-1, width) for x in vectors(parts)]
        factors = coefficients(wide).astype(tensor.blocks.work)
        result = sum(x * factor for x, factor in zip(wide, factors, strict=True))
        flat = np.asarray(result).reshape(-1)
        return flat + parts[0] if tensor.based else flat

    return compute


def _multislerp(tensor: Tensor) -> Compute:
    weights, normalize = tensor.values["weight"], tensor.values["normalize_weights"]
    if len(weights) == 1:
        return lambda parts, low: parts[-1]
    products = tensor.blocks.products(_vectors(tensor))
    coefficients = merge_spherical.multislerp(
        products, weights, normalize=normalize, eps=tensor.values["eps"], where=tensor.name
    )
    return _of_vectors(tensor, coefficients)


def _karcher(tensor: Tensor) -> Compute:
    products = tensor.blocks.products(lambda parts: parts)
    settings = {"max_iter": int(tensor.values["max_iter"]), "tol": tensor.values["tol"]}
    return _combined(merge_spherical.karcher(products, **settings), tensor.blocks.work)


def _model_stock(tensor: Tensor) -> Compute:
    blocks = tensor.blocks
    by_row = tensor.values["filter_wise"]
    width = blocks.shape[-1] if by_row and blocks.shape else 1
    whole = None if by_row else merge_spherical.stock_share(blocks.products(merge_deltas.deltas_of))

    def compute(parts: Parts, low: int) -> np.ndarray:
        mean = sum(parts[2:], parts[1]) / blocks.work.type(len(parts) - 1)
        share = whole
        if share is None:
            rows = [x.reshape(-1, width) for x in merge_deltas.deltas_of(parts)]
            share = np.repeat(merge_spherical.stock_share(merge_blocks.products(rows)), width)
        t = np.asarray(share).astype(blocks.work)
        return t * mean + (1 - t) * parts[0]

    return compute


def _deltas(kind: Kind) -> Callable[[Tensor], Compute]:
    def compute(tensor: Tensor) -> Compute:
        values, count = tensor.values, len(tensor.keys)
        settings = merge_deltas.Settings(
            weight=values["weight"],
            density=values.get("density", [1.0] * count),
            gamma=values.get("gamma", [0.0] * count),
            epsilon=values.get("epsilon", [0.0] * count),
            normalize=values["normalize"],
            rescale=values["rescale"],
            scale=values["lambda"],
            keys=tensor.keys,
        )
        return merge_deltas.task_vectors(tensor.blocks, kind, settings)

    return compute


def _nearswap(tensor: Tensor) -> Compute:
    t, least = tensor.blocks.work.type(tensor.values["t"]), tensor.blocks.work.type(1e-6)

    def compute(parts: Parts, low: int) -> np.ndarray:
        base, other = parts
        share = np.clip(t / np.maximum(np.abs(base - other), least), 0, 1)
        return share * other + (1 - share) * base

    return compute


def _passthrough(tensor: Tensor) -> Compute:
    (scale,) = tensor.values["scale"]
    if scale is None:
        return lambda parts, low: parts[0]
    return lambda parts, low: parts[0] * tensor.blocks.work.type(scale)


def _ram(tensor: Tensor) -> Compute:
    """Averages where several models changed, and takes the change where one did."""
    limit = tensor.blocks.work.type(tensor.values["epsilon"])

    def compute(parts: Parts, low: int) -> np.ndarray:
        deltas = merge_deltas.deltas_of(parts)
        changed = [np.abs(delta) > limit for delta in deltas]
        count = np.maximum(sum(x.astype(tensor.blocks.work) for x in changed), 1)
        total = sum(delta * x for delta, x in zip(deltas, changed, strict=True))
        return parts[0] + total / count

    return compute


_WEIGHT = Parameter(float, each=True)


def _delta_method(
    kind: Kind, *, normalize: bool = False, rescale: bool = False, **more: Parameter
) -> Method:
    parameters = {
        "weight": _WEIGHT,
        "density": Parameter(float, 1.0, each=True, low=0, high=1),
        **more,
        "lambda": Parameter(float, 1.0),
        "normalize": Parameter(bool, normalize),
        "rescale": Parameter(bool, rescale),
        "int8_mask": Parameter(
            bool, False
        ),  # the reference's storage of masks; results do not depend on it
    }
    return Method(
        compute=_deltas(kind),
        parameters=parameters,
        rows=lambda values: kind.drops == "ranked",
        random=kind.drops in ("random", "ranked"),
    )


_GAMMA = Parameter(float, 0.01, each=True, low=0, high=1)
_EPSILON = Parameter(float, 0.15, each=True, low=0, high=0.5)
_EPS = Parameter(float, 1e-8, low=0)

METHODS: dict[str, Method] = {
    "linear": Method(
        compute=_linear,
        parameters={"weight": _WEIGHT, "normalize": Parameter(bool, True)},
        base="config",
    ),
    "slerp": Method(compute=_slerp, parameters={"t": Parameter(float)}, most=1),
    "nuslerp": Method(
        compute=_nuslerp,
        parameters={
            "weight": _WEIGHT,
            "nuslerp_flatten": Parameter(bool, True),
            "nuslerp_row_wise": Parameter(bool, False),
        },
        base="possible",
        least=2,
        most=2,
        rows=lambda values: not values["nuslerp_flatten"],
    ),
    "multislerp": Method(
        compute=_multislerp,
        parameters={"weight": _WEIGHT, "normalize_weights": Parameter(bool, True), "eps": _EPS},
        base="possible",
    ),
    "karcher": Method(
        compute=_karcher,
        parameters={
            "max_iter": Parameter(int, 10, low=0, high=1000),
            "tol": Parameter(float, 1e-5, low=0),
        },
        base="config",
    ),
    "task_arithmetic": _delta_method(Kind()),
    "ties": _delta_method(Kind("largest", elects=True), normalize=True),
    "dare_linear": _delta_method(Kind("random"), rescale=True),
    "dare_ties": _delta_method(Kind("random", elects=True), rescale=True),
    "della_linear": _delta_method(Kind("ranked"), rescale=True, epsilon=_EPSILON),
    "della": _delta_method(
        Kind("ranked", elects=True), normalize=True, rescale=True, epsilon=_EPSILON
    ),
    "breadcrumbs": _delta_method(Kind("middle"), gamma=_GAMMA),
    "breadcrumbs_ties": _delta_method(Kind("middle", elects=True), gamma=_GAMMA),
    "sce": Method(
        compute=lambda tensor: merge_deltas.sce(tensor.blocks, tensor.values["select_topk"]),
        parameters={
            "select_topk": Parameter(float, 1.0, low=0, high=1),
            "int8_mask": Parameter(bool, False),
        },
    ),
    "model_stock": Method(
        compute=_model_stock,
        parameters={"filter_wise": Parameter(bool, False)},
        least=2,
        rows=lambda values: values["filter_wise"],
    ),
    "nearswap": Method(compute=_nearswap, parameters={"t": Parameter(float, low=0)}, most=1),
    "ram": Method(compute=_ram, parameters={"epsilon": Parameter(float, 1e-5, low=0)}),
    "passthrough": Method(
        compute=_passthrough,
        parameters={"scale": Parameter(float, None, each=True)},
        base="config",
        most=1,
    ),
}
