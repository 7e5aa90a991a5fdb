"""Dense models that share a seed as one mixture: what each of its parameters is made of, leaf by leaf.

FFNs, and with a mixture of attention whole attentions, become experts (BTX, arXiv 2403.07816; BAM, arXiv
2408.08274); routers are drawn; all else is the mean of the models. With Nexus (arXiv 2408.15901) the seed is no expert
and in no mean: its FFNs are those that all tokens share. A plan holds no values, so that arrays may be made one at
a time.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from model.moe import router_scale
from model.transforms import experts
from model.transforms.experts import ExpertAxis, Mixture

Shapes = Mapping[str, tuple[int, ...]]
Model = tuple[str, Shapes]  # its name, and the shape of each of its parameters by path


class UpcycleError(ValueError):
    """Models that cannot be made into the mixture that was asked for."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter of the mixture.

    Attributes:
      path, shape: of it.
      origin: what its values are, for people.
      reads: the parameters that it is made of, each as the name of a model and a path; none where it is drawn.
      make: the values, float32 or the sources' dtype, of these parameters, and of the index of the layer that
        they are where stacked layers are made one by one, else 0.
      by_rows: whether some rows of it are made of the same rows of what it reads.
    """

    path: str
    shape: tuple[int, ...]
    origin: str
    reads: tuple[tuple[str, str], ...]
    make: Callable[[Sequence[np.ndarray], int], np.ndarray]
    by_rows: bool = False


def plan(
    target: Shapes, sources: Sequence[Model], mixture: Mixture, *, shared: Model | None = None
) -> list[Piece]:
    """How each parameter of the mixture is made.

    Args:
      target: shape of each of its parameters, by path.
      sources: the models that become experts.
      mixture: what it is.
      shared: the model whose FFNs all tokens share, or None.

    Raises:
      UpcycleError: models of other shapes than the first, or parameters that nothing explains.
    """
    if len(sources) != mixture.experts:
        raise UpcycleError(f"{len(sources)} models do not make {mixture.experts} experts.")
    check_alike([*sources, *([shared] if shared else [])])
    shapes = sources[0][1]
    names = [name for name, _ in sources]
    pieces = [
        _piece(path, tuple(shape), shapes, names, mixture, shared and shared[0])
        for path, shape in target.items()
    ]
    placed = {path for piece in pieces for _, path in piece.reads}
    if unused := sorted(set(shapes) - placed):
        raise UpcycleError(f"the mixture has no place for {unused[0]} of the dense models.")
    return pieces


def check_alike(models: Sequence[Model]) -> None:
    """Raises UpcycleError for a model that has other parameters than the first."""
    (first, shapes), *others = models
    for name, found in others:
        if different := sorted(x for x in {*shapes, *found} if shapes.get(x) != found.get(x)):
            there, here = shapes.get(different[0]), found.get(different[0])
            raise UpcycleError(
                f"{name} is no branch of the seed of {first}: {different[0]} is "
                f"{list(here) if here else 'not there'}, where {first} has "
                f"{list(there) if there else 'none'}. All models come from one dense architecture."
            )


def _piece(
    path: str,
    shape: tuple[int, ...],
    dense: Shapes,
    names: Sequence[str],
    mixture: Mixture,
    shared: str | None,
) -> Piece:
    if shared is not None and re.fullmatch(experts.SHARED, path):
        source = path.replace("mlp/shared/", "mlp/")
        piece = Piece(path, dense.get(source, ()), f"of {shared}", ((shared, source),), _first)
    elif path not in dense:
        return drawn(path, shape, mixture)
    else:
        reads = tuple((name, path) for name in names)
        where = experts.expert_axis(path, mixture)
        if where is None:
            said = f"mean of {len(names)}"
            make = lambda parts, _: experts.mean(parts)  # noqa: E731
            piece = Piece(path, dense[path], said, reads, make, by_rows=True)
        else:
            piece = _side_by_side(path, dense[path], reads, where, mixture)
    if piece.shape != shape:
        raise UpcycleError(
            f"{path} of the mixture is {list(shape)}, and of the dense models it would be "
            f"{list(piece.shape)}: is the mixture of other sizes?"
        )
    return piece


def _side_by_side(
    path: str,
    dense: tuple[int, ...],
    reads: tuple[tuple[str, str], ...],
    where: ExpertAxis,
    mixture: Mixture,
) -> Piece:
    def make(parts: Sequence[np.ndarray], layer: int) -> np.ndarray:
        if where.axis == -3:
            parts = [experts.routed(x, path, mixture, j, layer) for j, x in enumerate(parts)]
        elif mixture.average_attention:
            parts = [experts.mean(parts)] * len(parts)
        return experts.joined(parts, where)

    if where.axis == -3:
        shape = (*dense[:-2], mixture.experts, *dense[-2:])
    else:
        wider = list(dense)
        wider[where.axis] *= mixture.experts
        shape = tuple(wider)
    said = "copied, one beside the other" + changes(path, mixture)
    if mixture.average_attention and where.axis != -3:
        said = f"mean of {len(reads)}, as often"
    return Piece(path, shape, said, reads, make)


def changes(path: str, mixture: Mixture) -> str:
    """What an expert's kernel is beside a copy, to be told."""
    if not re.fullmatch(experts.FFN, path):
        return ""
    said = f", {mixture.drop_ratio:g} of units redrawn" if mixture.drop_ratio else ""
    scaled = mixture.expert_scale != 1.0 and path.endswith("/down/kernel")
    return said + (f", times {mixture.expert_scale:g}" if scaled else "")


def _first(parts: Sequence[np.ndarray], layer: int) -> np.ndarray:
    del layer
    return parts[0]


def drawn(path: str, shape: tuple[int, ...], mixture: Mixture, *key: int) -> Piece:
    """A router's parameter that no model has.

    Args:
      path, shape: of it.
      mixture: with the deviations of routers.
      key: of the draw, beside the mixture's seed.

    Raises:
      UpcycleError: it is no router's.
    """
    match = re.fullmatch(experts.ROUTER, path)
    if match is None:
        raise UpcycleError(f"nothing explains {path} {list(shape)} of the mixture.")
    if match[3] == "domains":
        if (domains := mixture.domains) is None:
            raise UpcycleError(
                f"{path} of the mixture is embeddings of domains, and none are given."
            )
        if domains.shape != shape[-2:]:
            raise UpcycleError(
                f"{path} of the mixture is {list(shape)}, and embeddings are {list(domains.shape)}: "
                "is DomainRouter.domain_dim their width?"
            )
        return Piece(path, shape, "embeddings", (), lambda *_: np.broadcast_to(domains, shape))
    std = _std(match[3], shape, mixture)
    values = lambda *_: experts.draw(path, shape, std, mixture.seed, *key)  # noqa: E731
    return Piece(path, shape, "drawn", (), values)


def _std(kind: str, shape: tuple[int, ...], mixture: Mixture) -> float:
    """Deviation of a router's kernel [..., in, out]."""
    fan_in, width = shape[-2:]
    if kind == "kernel":
        return mixture.router_std
    if kind != "down/kernel":
        return 1 / math.sqrt(fan_in)
    if mixture.domains is not None:
        return router_scale.down_std(mixture.domains.shape[-1], width, mixture.logit_std)
    return router_scale.token_down_std(fan_in, mixture.logit_std)


def table(pieces: Sequence[Piece], names: Sequence[tuple[str, str]]) -> list[str]:
    """The experts in their order, and what became of each parameter, as lines.

    Args:
      pieces: of the mixture.
      names: of the experts, and of what each is made of.
    """
    rows = [("path", "shape", "values", "from")]
    for piece in pieces:
        size = math.prod(piece.shape)
        shape = " x ".join(map(str, piece.shape))
        rows.append((piece.path, shape, f"{size:,}", piece.origin))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    just = (str.ljust, str.ljust, str.rjust, str.ljust)
    wide = max(len(name) for name, _ in names)
    named = [f"expert {i}  {name.ljust(wide)}  {source}" for i, (name, source) in enumerate(names)]
    return [line.rstrip() for line in named] + [
        "  ".join(f(cell, w) for f, cell, w in zip(just, row, widths, strict=True)).rstrip()
        for row in rows
    ]
