"""Joins experts in the arrays of a mixture, and draws random values, in numpy; exact except for averages.

Shapes: E experts, K key/value heads, G query heads for each, H head dim, D width, F hidden width, M width of an
embedding of a domain, '...' stacked layers.
"""

import dataclasses
import re
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

FFN = r"(.*/)?mlp/(gate|up|down)/kernel"
SHARED = r"(.*/)?mlp/shared/(gate|up|down)/kernel"
ROUTER = r"(.*/)?(mlp|attention)/router/(kernel|domains|(gate|up|down)/kernel)"
_HEADS = r"(.*/)?attention/(query|key|value|out)/(kernel|bias)"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """Settings of a mixture that its parameters depend on.

    Attributes:
      experts: E, the number of FFN experts and of attention experts, without the shared FFN.
      kv_heads: K of one expert.
      scanned: whether arrays below `layers/` stack layers on their leading axis.
      ffn: whether FFNs are experts; if not, the mixture is a dense model whose parameters are means.
      attention: whether attentions are also experts.
      average_attention: whether each attention expert is the mean of all models: a control with the same number of
        parameters and no specialisation.
      shared_kv: whether attention experts share keys and values, which are the mean of all models.
      router: kind of router: linear in the tokens, a projection of `domains`, or an MLP.
      domains: embeddings [E, M] of the experts' data, for a projection router.
      router_std: standard deviation of linear routers' kernels.
      logit_std: standard deviation of the first logits of other routers.
      seed: seed of the routers' initial values.
      expert_scale: factor on the down-projections of routed experts. If weights are probabilities that are not
        renormalised, N copies of one FFN give about 1/N of its output; a factor of N corrects this
        (arXiv 2410.07524).
      drop_ratio: fraction of the hidden units of each routed expert that is redrawn, see `dropped`.
      drop_seed: seed of the redrawn values.
    """

    experts: int
    kv_heads: int
    scanned: bool = False
    ffn: bool = True
    attention: bool = False
    average_attention: bool = False
    shared_kv: bool = False
    router: Literal["linear", "projection", "mlp"] = "linear"
    domains: np.ndarray | None = None
    router_std: float = 0.02
    logit_std: float = 0.1
    seed: int = 0
    expert_scale: float = 1.0
    drop_ratio: float = 0.0
    drop_seed: int = 0

    def slices(self, path: str) -> Literal["layers", "whole"]:
        """Returns the slices of an experts' array's recipe: "layers" if layers are stacked. See base.Recipe."""
        return "layers" if self.scanned and path.startswith("layers/") else "whole"


@dataclasses.dataclass(frozen=True)
class ExpertAxis:
    """The axis of an array along which experts are concatenated.

    Attributes:
      axis: index of the axis, counted from the end of the shape.
      groups: number of equal parts of the axis; each has a part of every expert.
    """

    axis: int
    groups: int = 1


def expert_axis(path: str, mixture: Mixture) -> ExpertAxis | None:
    """Returns the expert axis of a parameter of the mixture; None for parameters that experts share."""
    if re.fullmatch(FFN, path):
        return ExpertAxis(-3) if mixture.ffn else None
    if match := re.fullmatch(ROUTER, path):
        kind = match[3]
        if kind == "domains":
            return ExpertAxis(-2)
        last = kind == "kernel" or (kind == "down/kernel" and mixture.router == "mlp")
        return ExpertAxis(-1) if last else None
    match = re.fullmatch(_HEADS, path)
    if not mixture.attention or match is None:
        return None
    # The order of heads in model/bam/moa.py: by expert, or by key/value head if experts share these.
    name, kind = match[2], match[3]
    groups = mixture.kv_heads if mixture.shared_kv else 1
    if name == "out":
        return ExpertAxis(-2, groups) if kind == "kernel" else None  # one bias is added once
    return None if mixture.shared_kv and name in ("key", "value") else ExpertAxis(-1, groups)


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
    """Returns a routed expert's kernel [..., 1, X, Y] from a dense model's [..., X, Y] of one layer."""
    kernel = dropped(kernel, path, mixture, expert, layer)
    if mixture.expert_scale != 1.0 and path.endswith("/down/kernel"):
        kernel = (kernel.astype(np.float32) * np.float32(mixture.expert_scale)).astype(kernel.dtype)
    return np.expand_dims(kernel, -3)


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
    axis = -2 if path.endswith("/down/kernel") else -1
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
