"""The matrices of a model whose gradients influence is computed from, and the parameters that have no tap.

A site is one matrix parameter, or a stack of them: [L, X, Y] where layers are scanned, [E, X, Y] for experts. A bias is the
last row of its site. Shapes: B batch, T length, X inputs (with the bias row), Y outputs, L layers, E experts.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from espalier.common.spelling import few
from espalier.model.kernels import taps
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.objectives.forward import decoder_arguments

# Groups of sites by name, and the patterns that they stand for.
GROUPS = {
    "mlp": (r"(.*/)?mlp/(shared/)?(gate|up|down)",),
    "attention": (r"(.*/)?\w*attention/(query|key|value|out)",),
    "adapters": (r"(.*/)?adapter_\w+(/.*)?",),
    "head": ("head",),
    "all": (r".*",),
}
DEFAULT = ("mlp",)
HEAD = "head"
# Most tokens in a block of the head's covariance of gradients, which would be [V, V].
HEAD_BLOCK = 16_384


class SiteError(ValueError):
    """Modules that match no site, or that cannot be tapped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One tapped matrix, or a stack of them.

    Attributes:
      path: path of the matrix among the parameters; 'head' for the output matrix.
      inputs, outputs: X and Y; X includes the bias row.
      bias: whether the last row is the bias.
      layers: L where layers are scanned, None elsewhere.
      experts: E of stacked experts, None elsewhere.
      stream: whether its tokens are the decoder's or the encoder's.
      parameter: path of the parameter; of the head, the table [V, D].
      tied: whether the parameter is also the table of the model's inputs.
    """

    path: str
    inputs: int
    outputs: int
    bias: bool = False
    layers: int | None = None
    experts: int | None = None
    stream: Literal["decoder", "encoder"] = "decoder"
    parameter: str = ""
    tied: bool = False

    @property
    def module(self) -> str:
        """Path of the module that owns the matrix."""
        return self.path.rpartition("/")[0] or self.path

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading dimensions: layers, then experts."""
        return tuple(size for size in (self.layers, self.experts) if size is not None)

    @property
    def scan(self) -> tuple[int, ...]:
        """(L,) where layers are scanned, () elsewhere: the first dimension of what a tap reads and returns."""
        return () if self.layers is None else (self.layers,)

    @property
    def stack(self) -> tuple[int, ...]:
        """(E,) for experts, () elsewhere."""
        return () if self.experts is None else (self.experts,)

    def blocks(self, least: int) -> tuple[int, int]:
        """Returns how many diagonal blocks the two covariances have, of inputs and gradients: `least`, more for a large head."""
        return least, max(least, -(-self.outputs // HEAD_BLOCK) if self.path == HEAD else 1)

    def matches(self, pattern: str) -> bool:
        return any(re.fullmatch(pattern, path) for path in (self.path, self.module))

    def tangents(self, matrix: jax.Array) -> dict[str, jax.Array]:
        """Returns a change [.., X, Y] of the matrix as changes of the parameters by path."""
        if self.path == HEAD:
            return {self.parameter: jnp.swapaxes(matrix, -1, -2)}
        if not self.bias:
            return {self.parameter: matrix}
        return {
            self.parameter: matrix[..., :-1, :],
            f"{self.module}/bias": matrix[..., -1, :],
        }

    def matrix(self, values: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the matrix [.., X, Y] of gradients of the parameters by path; the inverse of `tangents`."""
        main = values[self.parameter]
        if self.path == HEAD:
            return jnp.swapaxes(main, -1, -2)
        if not self.bias:
            return main
        return jnp.concatenate([main, values[f"{self.module}/bias"][..., None, :]], axis=-2)


class _Recorder:
    """A tap that notes the projections of one trace."""

    def __init__(self, streams: Mapping[tuple[int, ...], str]):
        self.streams = streams
        self.uses: dict[str, list[dict[str, Any]]] = {}

    def projection(self, module, name, x, y, *, bias, sizes, rows):
        use = {"bias": bias, "inputs": x.shape[-1] + bias, "outputs": y.shape[-1]}
        use["experts"] = None if sizes is None else sizes.shape[-1]
        known = x.ndim == 3 and tuple(x.shape[:2]) in self.streams
        use["stream"] = self.streams[tuple(x.shape[:2])] if known else None
        if sizes is not None:  # experts of decoder or encoder layers
            encoder = "encoder" in module.path and "encoder" in self.streams.values()
            use["stream"] = ("encoder" if encoder else "decoder") if rows is not None else None
        uses = self.uses.setdefault("/".join((*module.path, name)), [])
        # A scan traces its layers twice; a projection that is used twice occurs twice in one trace.
        use["trace"] = getattr(y, "_trace", None)
        uses.append(use)
        return y

    def lookup(self, module, name, ids, y):
        return y


def discover(model: Any, params: Any) -> tuple[dict[str, Site], list[str]]:
    """Returns the model's sites by path, and the paths of parameters without a tap.

    A projection that is used several times, or whose inputs are not tokens, has none.

    Args:
      model: a language model.
      params: its parameters, or their shapes.
    """
    flat = state_tree.flatten(params)
    ids = {"decoder": jax.ShapeDtypeStruct((1, 8), jnp.int32)}
    batch = {"decoder_input_tokens": ids["decoder"], "decoder_segment_ids": ids["decoder"]}
    if model.row.encodes:
        ids["encoder"] = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        batch |= dict.fromkeys(("encoder_input_tokens", "encoder_segment_ids"), ids["encoder"])
    recorder = _Recorder({shape.shape: stream for stream, shape in ids.items()})

    def trace(params: Any, batch: Any) -> Any:
        args, keywords = decoder_arguments(batch, False)
        return model.apply({"params": params}, *args, **keywords, method="hidden")

    with taps.installed(recorder):
        jax.eval_shape(trace, params, batch)
    sites = {}
    for path, uses in recorder.uses.items():
        use = uses[-1]
        once = sum(other.pop("trace") is use["trace"] for other in uses[:-1]) == 0
        del use["trace"]
        if once and use["stream"] is not None and path in flat:
            sites[path] = _site(path, use, flat[path].shape)
    head = _head(model, flat)
    if head is not None:
        sites[HEAD] = head
    covered = {site.parameter for site in sites.values()}
    covered |= {f"{site.module}/bias" for site in sites.values() if site.bias}
    return sites, [path for path in flat if path not in covered]


def _site(path: str, use: Mapping[str, Any], shape: tuple[int, ...]) -> Site:
    own = 2 if use["experts"] is None else 3
    layers = shape[0] if len(shape) > own else None
    return Site(path=path, parameter=path, layers=layers, **use)


def _head(model: Any, flat: Mapping[str, Any]) -> Site | None:
    tied = bool(model.tie_embeddings)
    parameter = "token_embed/embedding" if tied else "lm_head/embedding"
    if parameter not in flat:
        return None
    rows, width = flat[parameter].shape
    return Site(path=HEAD, inputs=width, outputs=rows, parameter=parameter, tied=tied)


def select(model: Any, params: Any, modules: Sequence[str] = DEFAULT) -> dict[str, Site]:
    """Returns the sites that names in GROUPS, or patterns of whole paths of modules or matrices, choose; sorted by path.

    Raises:
      SiteError: the model has no taps, a pattern is malformed or matches no site, or some of the adapters have no tap.
    """
    sites, rest = discover(model, params)
    if set(sites) <= {HEAD}:
        raise SiteError(
            f"No layer of this {type(model).__name__} has a tap: {few(rest, 6)}. Influence needs projections that are "
            "`Dense` or `ExpertDense` (model/linear.py, model/moe/moe.py)."
        )
    chosen: dict[str, Site] = {}
    for name in modules:
        for pattern in GROUPS.get(name, (name,)):
            try:
                matching = {path: site for path, site in sites.items() if site.matches(pattern)}
            except re.error as error:
                raise SiteError(f"--modules={name} is not a regular expression: {error}.") from None
            if name == "all":
                matching.pop(HEAD, None)
            untapped = [path for path in rest if _matches_parameter(pattern, path)]
            if not matching:
                raise SiteError(_no_match(name, untapped, sites))
            if name == "adapters" and untapped:
                raise SiteError(
                    f"--modules=adapters would leave out {few(untapped, 6)}, which have no tap. Name those to use by a "
                    f"pattern in its place; with a tap: {few(matching, 6)}."
                )
            chosen |= matching
    return {path: chosen[path] for path in sorted(chosen)}


def _no_match(name: str, untapped: Sequence[str], sites: Mapping[str, Site]) -> str:
    if untapped:
        return (
            f"--modules={name} matches only parameters without a tap ({few(untapped, 6)}): norms, tables, biases of "
            f"factorised layers, and vectors of adapters cannot be tapped. Layers with a tap: {few(sites, 6)}."
        )
    return f"--modules={name} matches no layer. Layers with a tap: {few(sites, 6)}."


def _matches_parameter(pattern: str, path: str) -> bool:
    return any(re.fullmatch(pattern, part) for part in (path, path.rpartition("/")[0]))


def blocked_head(sites: Mapping[str, Site], blocks: int) -> str | None:
    """Returns a sentence on what a large head's blocks leave out; None if it has no more blocks than the other matrices."""
    head = sites.get(HEAD)
    if head is None or (count := head.blocks(blocks)[1]) == blocks:
        return None
    size = -(-head.outputs // count)
    sizes = [min(size, head.outputs - first) for first in range(0, head.outputs, size)]
    left_out = 1 - sum(own * own for own in sizes) / head.outputs**2
    return (
        f"head: the covariance of the gradients of {head.outputs:,} tokens is approximated by {count} diagonal blocks of at most "
        f"{size:,} tokens; {100 * left_out:.1f} % of its entries, between tokens of different blocks, are taken as zero"
    )


def weights(sites: Mapping[str, Site]) -> int:
    """Returns the number of weights of all sites."""
    return sum(math.prod(s.lead) * s.inputs * s.outputs for s in sites.values())
