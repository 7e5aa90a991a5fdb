"""Dense models that share a seed as one mixture: what each of its parameters is made of, leaf by leaf.

FFNs, and with a mixture of attention whole attentions, become experts (BTX, arXiv 2403.07816; BAM, arXiv
2408.08274); routers are drawn; all else is the mean of the models. A plan holds no values, so that arrays may be
made one at a time.

Shapes: E experts, K key/value heads, G query heads for each, H head dim, '...' stacked layers.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

Origin = Literal["experts", "mean", "drawn"]
Shapes = Mapping[str, tuple[int, ...]]

_FFN = r"(.*/)?mlp/(gate|up|down)/kernel"
_ROUTER = r"(.*/)?(mlp|attention)/router/kernel"
_HEADS = r"(.*/)?attention/(query|key|value|out)/(kernel|bias)"


class UpcycleError(ValueError):
    """Models that cannot be made into the mixture that was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """What the plan must know of the mixture.

    Attributes:
      experts: E, of FFNs and of attention alike.
      kv_heads: K of one expert.
      attention: whether attentions are experts too.
      shared_kv: whether they share keys and values, the mean of all.
      router_std: deviation of the routers' draw.
      seed: of that draw.
    """

    experts: int
    kv_heads: int
    attention: bool = False
    shared_kv: bool = False
    router_std: float = 0.02
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter of the mixture.

    Attributes:
      path, shape: of it.
      origin: 'experts' for side by side, 'mean', or 'drawn'.
      make: the values, float32 or the sources' dtype, of the models' parameters at the same path.
    """

    path: str
    shape: tuple[int, ...]
    origin: Origin
    make: Callable[[Sequence[np.ndarray]], np.ndarray]


def plan(target: Shapes, sources: Sequence[tuple[str, Shapes]], mixture: Mixture) -> list[Piece]:
    """How each parameter of the mixture is made.

    Args:
      target: shape of each of its parameters, by path.
      sources: name of each model, and shape of each of its parameters.
      mixture: what it is.

    Raises:
      UpcycleError: models of other shapes than the first, or parameters that nothing explains.
    """
    if len(sources) != mixture.experts:
        raise UpcycleError(f"{len(sources)} models do not make {mixture.experts} experts.")
    (first, shapes), *others = sources
    for name, found in others:
        if different := sorted(x for x in {*shapes, *found} if shapes.get(x) != found.get(x)):
            there, here = shapes.get(different[0]), found.get(different[0])
            raise UpcycleError(
                f"{name} is no branch of the seed of {first}: {different[0]} is "
                f"{list(here) if here else 'not there'}, where {first} has "
                f"{list(there) if there else 'none'}. All experts come from one dense architecture."
            )
    pieces = [_piece(path, shape, shapes.get(path), mixture) for path, shape in target.items()]
    if unused := sorted(set(shapes) - {piece.path for piece in pieces if piece.origin != "drawn"}):
        raise UpcycleError(f"the mixture has no place for {unused[0]} of the dense models.")
    return pieces


def _piece(
    path: str, shape: tuple[int, ...], dense: tuple[int, ...] | None, mixture: Mixture
) -> Piece:
    if dense is None:
        if not re.fullmatch(_ROUTER, path):
            raise UpcycleError(f"nothing explains {path} {list(shape)} of the mixture.")
        return Piece(path, shape, "drawn", lambda _: _draw(path, shape, mixture))
    if re.fullmatch(_FFN, path):
        piece = Piece(path, (*dense[:-2], mixture.experts, *dense[-2:]), "experts", stacked)
    elif (axis := _head_axis(path, mixture)) is not None:
        wider = list(dense)
        wider[axis] *= mixture.experts
        piece = Piece(path, tuple(wider), "experts", lambda parts: joined(parts, axis, mixture))
    else:
        piece = Piece(path, dense, "mean", mean)
    if piece.shape != tuple(shape):
        raise UpcycleError(
            f"{path} of the mixture is {list(shape)}, and of the dense models' {list(dense)} it would be "
            f"{list(piece.shape)}: is the mixture of other sizes?"
        )
    return piece


def _head_axis(path: str, mixture: Mixture) -> int | None:
    """The axis along which heads of experts lie side by side; None for what they share."""
    match = re.fullmatch(_HEADS, path)
    if not mixture.attention or match is None:
        return None
    name, kind = match[2], match[3]
    if name == "out":
        return -2 if kind == "kernel" else None  # one bias is added once
    return None if mixture.shared_kv and name in ("key", "value") else -1


def mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The uniform mean, computed in float32."""
    total = np.zeros(parts[0].shape, np.float32)
    for part in parts:
        total += part.astype(np.float32)
    return total / np.float32(len(parts))


def stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Kernels [..., X, Y] as experts [..., E, X, Y]."""
    return np.stack(parts, axis=-3)


def joined(parts: Sequence[np.ndarray], axis: int, mixture: Mixture) -> np.ndarray:
    """Heads of experts side by side along `axis`, in the order of model/moa.py."""
    if not mixture.shared_kv:
        return np.concatenate(parts, axis=axis)
    # [..., K, G * H] of each expert: key/value head by key/value head, expert by expert.
    split = [
        np.moveaxis(part, axis, -1).reshape(
            *np.moveaxis(part, axis, -1).shape[:-1], mixture.kv_heads, -1
        )
        for part in parts
    ]
    heads = np.stack(split, axis=-2)
    return np.moveaxis(heads.reshape(*heads.shape[:-3], -1), -1, axis)


def _draw(path: str, shape: tuple[int, ...], mixture: Mixture) -> np.ndarray:
    """The same for a path whatever else is drawn."""
    rng = np.random.default_rng([mixture.seed, zlib.crc32(path.encode())])
    return (mixture.router_std * rng.normal(size=shape)).astype(np.float32)


def table(pieces: Sequence[Piece], experts: Sequence[str]) -> list[str]:
    """The experts in their order, and what was copied, averaged and drawn, as lines."""
    rows = [("path", "shape", "values", "from")]
    said = {
        "experts": "copied, one beside the other",
        "mean": f"mean of {len(experts)}",
        "drawn": "drawn",
    }
    for piece in pieces:
        size = int(np.prod(piece.shape, dtype=np.int64))
        shape = " x ".join(map(str, piece.shape))
        rows.append((piece.path, shape, f"{size:,}", said[piece.origin]))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    just = (str.ljust, str.ljust, str.rjust, str.ljust)
    named = [f"expert {index}  {name}" for index, name in enumerate(experts)]
    return named + [
        "  ".join(f(cell, w) for f, cell, w in zip(just, row, widths, strict=True)).rstrip()
        for row in rows
    ]
