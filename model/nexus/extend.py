"""A mixture with an expert more or one less (Nexus, arXiv 2408.15901): parameter by parameter.

The new expert's FFN, and its attention where attentions are experts, come last. A projection router takes the embedding
of its data and stays as it is; the columns of other routers are drawn. All that experts share moves to the new model
by a weight, but the FFN that all tokens share. What is taken away again leaves what was there before.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from model.transforms import experts, upcycle
from model.transforms.experts import ExpertAxis, Mixture
from model.transforms.upcycle import Model, Piece, Shapes, UpcycleError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition:
    """How an expert is added.

    Attributes:
      merge: weight of the new model in what no expert has for itself; with 1 / (E + 1) a mean of E models becomes
        that of E + 1, with 0 it stays.
      router: of one that is no projection: 'append' draws the new expert's column, 'reset' draws all of it.
    """

    merge: float
    router: Literal["append", "reset"] = "append"


def plan_addition(
    target: Shapes, old: Model, new: Model, mixture: Mixture, addition: Addition
) -> list[Piece]:
    """How each parameter of the larger mixture is made.

    Args:
      target: shape of each of its parameters, by path.
      old: the mixture.
      new: the dense model.
      mixture: what the larger mixture is.
      addition: how the one becomes the other.

    Raises:
      UpcycleError: parameters of other shapes, or that nothing explains.
    """
    pieces = [_added(path, tuple(x), old, new, mixture, addition) for path, x in target.items()]
    unused = set(old[1]) - set(target)
    if addition.merge:
        unused |= set(new[1]) - {path for x in pieces for name, path in x.reads if name == new[0]}
    if unused:
        raise UpcycleError(f"the larger mixture has no place for {min(unused)}.")
    return pieces


def plan_removal(target: Shapes, old: Model, mixture: Mixture, expert: int) -> list[Piece]:
    """How each parameter of the mixture without one of its experts is made.

    Args:
      target: shape of each of its parameters, by path.
      old: the mixture.
      mixture: what the mixture was.
      expert: the index of the one to go.

    Raises:
      UpcycleError: parameters of other shapes.
    """
    pieces = []
    for path, shape in target.items():
        where = experts.expert_axis(path, mixture)
        if where is None:
            pieces.append(_kept(path, tuple(shape), old))
            continue
        was = _found(path, old)
        _check(path, _resized(was, where, -_size(was, where, mixture.experts)), shape)

        def make(parts: Sequence[np.ndarray], layer: int, where: ExpertAxis = where) -> np.ndarray:
            del layer
            return experts.without(parts[0], where, expert, mixture.experts)

        pieces.append(Piece(path, tuple(shape), "without one", ((old[0], path),), make))
    return pieces


def _added(
    path: str,
    shape: tuple[int, ...],
    old: Model,
    new: Model,
    mixture: Mixture,
    addition: Addition,
) -> Piece:
    router = re.fullmatch(experts.ROUTER, path) is not None
    where = experts.expert_axis(path, mixture)
    if router and addition.router == "reset":
        return upcycle.drawn(path, shape, mixture, mixture.experts)
    if where is None:
        if router or re.fullmatch(experts.SHARED, path) or not addition.merge:
            return _kept(path, shape, old)
        return _merged(path, shape, old, new, addition.merge)
    was = _found(path, old)
    size = _size(was, where, mixture.experts - 1)
    _check(path, _resized(was, where, size), shape)
    one = _resized(was, where, size - was[where.axis])  # of a single expert
    if router:
        return _with_drawn(path, shape, old, one, where, mixture)
    dense = (*one[:-3], *one[-2:]) if where.axis == -3 else one
    if (found := new[1].get(path)) != dense:
        raise UpcycleError(
            f"{new[0]} is no branch of the seed of {old[0]}: {path} is "
            f"{list(found) if found else 'not there'}, where an expert has {list(dense)}."
        )

    def make(parts: Sequence[np.ndarray], layer: int) -> np.ndarray:
        kept, kernel = parts
        if where.axis == -3:
            kernel = experts.routed(kernel, path, mixture, mixture.experts - 1, layer)
        return experts.joined([kept, kernel.astype(kept.dtype)], where)

    said = f"one more, copied{upcycle.changes(path, mixture)}"
    return Piece(path, shape, said, ((old[0], path), (new[0], path)), make)


def _with_drawn(
    path: str,
    shape: tuple[int, ...],
    old: Model,
    one: tuple[int, ...],
    where: ExpertAxis,
    mixture: Mixture,
) -> Piece:
    """A router's array with the column of one more expert, or the embedding of its data."""
    domains = None if mixture.domains is None else mixture.domains[-1:]
    last = dataclasses.replace(mixture, domains=domains)
    column = upcycle.drawn(path, one, last, mixture.experts)

    def make(parts: Sequence[np.ndarray], layer: int) -> np.ndarray:
        kept, drawn = parts[0], column.make([], 0)
        if len(drawn) != len(kept):  # of all stacked layers
            drawn = drawn[layer : layer + 1]
        return experts.joined([kept, drawn.astype(kept.dtype)], where)

    return Piece(path, shape, f"one more, {column.origin}", ((old[0], path),), make)


def _merged(path: str, shape: tuple[int, ...], old: Model, new: Model, merge: float) -> Piece:
    _check(path, _found(path, old), shape)
    _check(path, _found(path, new), shape)

    def make(parts: Sequence[np.ndarray], layer: int) -> np.ndarray:
        del layer
        there, here = (part.astype(np.float32) for part in parts)
        return np.float32(1 - merge) * there + np.float32(merge) * here

    said = f"{1 - merge:.3g} of the mixture, {merge:.3g} of the new model"
    return Piece(path, shape, said, ((old[0], path), (new[0], path)), make, by_rows=True)


def _kept(path: str, shape: tuple[int, ...], old: Model) -> Piece:
    _check(path, _found(path, old), shape)
    return Piece(path, shape, "kept", ((old[0], path),), lambda parts, _: parts[0], by_rows=True)


def _found(path: str, model: Model) -> tuple[int, ...]:
    if path not in model[1]:
        raise UpcycleError(f"{model[0]} has no {path}: is its configuration that of the mixture?")
    return tuple(model[1][path])


def _check(path: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if found != tuple(shape):
        raise UpcycleError(
            f"{path} would be {list(found)} and is {list(shape)} by the configuration: do the models have other "
            "sizes?"
        )


def _size(shape: tuple[int, ...], where: ExpertAxis, count: int) -> int:
    """What one of so many experts takes of the axis."""
    return shape[where.axis] // count


def _resized(shape: tuple[int, ...], where: ExpertAxis, more: int) -> tuple[int, ...]:
    wider = list(shape)
    wider[where.axis] += more
    return tuple(wider)
