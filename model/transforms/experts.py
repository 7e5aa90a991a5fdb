"""Experts side by side in the arrays of a mixture, and the values drawn for them: numpy, exact except for averages.

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
      experts: E, of FFNs and of attention alike, without the shared one.
      kv_heads: K of one expert.
      scanned: whether arrays below `layers/` stack layers on their leading axis.
      ffn: whether FFNs are experts; if not, the mixture is a dense model of means.
      attention: whether attentions are experts too.
      average_attention: whether each attention expert is the mean of all: a control with as many parameters and
        no specialisation.
      shared_kv: whether they share keys and values, the mean of all.
      router: a linear one, or that of model/nexus/domain_router.py or model/nexus/mlp_router.py.
      domains: embeddings [E, M] of the experts' data, for a projection router.
      router_std: standard deviation of linear routers' kernels.
      logit_std: standard deviation of the first logits of other routers.
      seed: of these draws.
      expert_scale: factor on the down-projections of routed experts. Behind raw probabilities N copies of one FFN
        give about 1/N of its output; a factor of N restores it (arXiv 2410.07524).
      drop_ratio: share of the hidden units of each routed expert that is redrawn, see `dropped`.
      drop_seed: of that draw.
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
        """How experts' arrays are made: layer by layer where layers are stacked, see base.Recipe."""
        return "layers" if self.scanned and path.startswith("layers/") else "whole"


@dataclasses.dataclass(frozen=True)
class ExpertAxis:
    """Where experts lie side by side in an array.

    Attributes:
      axis: of the array, counted from its end.
      groups: equal parts of the axis, each with a part of every expert.
    """

    axis: int
    groups: int = 1


def expert_axis(path: str, mixture: Mixture) -> ExpertAxis | None:
    """The expert axis of a parameter of the mixture; None for parameters that experts share."""
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
    # The order of model/bam/moa.py: expert by expert, but key/value head by head where experts share these.
    name, kind = match[2], match[3]
    groups = mixture.kv_heads if mixture.shared_kv else 1
    if name == "out":
        return ExpertAxis(-2, groups) if kind == "kernel" else None  # one bias is added once
    return None if mixture.shared_kv and name in ("key", "value") else ExpertAxis(-1, groups)


def joined(parts: Sequence[np.ndarray], where: ExpertAxis) -> np.ndarray:
    """Joins arrays of one or several experts each into one array."""
    split = [_last(part, where.axis) for part in parts]
    split = [part.reshape(*part.shape[:-1], where.groups, -1) for part in split]
    whole = np.concatenate(split, axis=-1)
    return np.moveaxis(whole.reshape(*whole.shape[:-2], -1), -1, where.axis)


def without(array: np.ndarray, where: ExpertAxis, expert: int, experts: int) -> np.ndarray:
    """Removes one of so many experts from an array."""
    split = _last(array, where.axis)
    split = split.reshape(*split.shape[:-1], where.groups, experts, -1)
    rest = np.delete(split, expert, axis=-2)
    return np.moveaxis(rest.reshape(*rest.shape[:-3], -1), -1, where.axis)


def _last(array: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(array, axis, -1)


def mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The uniform mean, computed in float32."""
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

    Of the F hidden units of an expert a random set S of floor(R F) is dropped, another one in each expert and layer
    and the same in its three matrices: columns of `gate` and `up`, rows of `down`. In each matrix the entries of S
    are drawn anew from a normal with the mean and the standard deviation of the entries of S; all others stay.

    Args:
      kernel: [..., D, F], or [..., F, D] for `down`, of one layer.
      path: of the kernel in the mixture.
      mixture: its drop_ratio is R.
      expert: index of the expert.
      layer: index in the stack of layers under this path.
    """
    axis = -2 if path.endswith("/down/kernel") else -1
    count = int(mixture.drop_ratio * kernel.shape[axis] + 1e-9)  # 0.3 * 10 is less than 3
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
    """Normal values that depend on path and key alone, not on other draws."""
    rng = np.random.default_rng([*key, zlib.crc32(path.encode())])
    return (std * rng.normal(size=shape)).astype(np.float32)
