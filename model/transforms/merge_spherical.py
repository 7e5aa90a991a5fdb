"""Merges of tensors as vectors: SLERP and its relatives, the Karcher mean, and Model Stock.

Each result is a linear combination of the inputs. Its coefficients follow from the inner products of the inputs, which
one pass sums in float64. Every function takes inner products [N, N] of whole tensors, or [N, N, R] of R rows.
"""

import math
from collections.abc import Sequence

import numpy as np

from espalier.model.transforms.base import TransformError

_LINEAR = 0.9995  # |cosine| above which SLERP is linear
_TINY = 1e-8


def slerp(products: np.ndarray, t: float) -> np.ndarray:
    """Returns the coefficients [2] of SLERP from the first tensor (t = 0) to the second (t = 1)."""
    norms = np.sqrt(np.array([products[0, 0], products[1, 1]]))
    norms = np.where(norms > _TINY, norms, 1)
    cosine = np.clip(products[0, 1] / (norms[0] * norms[1]), -1, 1)
    return _on_arc(cosine, t, linear=np.abs(cosine) > _LINEAR)


def nuslerp(products: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Returns the coefficients [2, ...] of SLERP by weights, linear only for parallel vectors."""
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    norms = np.maximum(np.sqrt(np.array([products[0, 0], products[1, 1]])), 1e-7)
    cosine = np.clip(products[0, 1] / (norms[0] * norms[1]), -1, 1)
    return _on_arc(cosine, t, linear=1 - np.square(cosine) <= _TINY**2)


def _on_arc(cosine: np.ndarray, t: float, linear: np.ndarray) -> np.ndarray:
    angle = np.arccos(np.where(linear, 0, cosine))
    arc = np.array([np.sin((1 - t) * angle), np.sin(t * angle)]) / np.sin(angle)
    line = np.array([np.full_like(cosine, 1 - t), np.full_like(cosine, t)])
    return np.where(linear, line, arc)


def multislerp(
    products: np.ndarray, weights: Sequence[float], *, normalize: bool, eps: float, where: str
) -> np.ndarray:
    """Returns the coefficients [N] of the barycentre on the sphere, with the weighted mean of the norms.

    The barycentre in the tangent space at the normalised weighted mean of the directions is that mean itself.
    """
    share = np.array(weights, np.float64)
    if normalize:
        share = share / share.sum()
    norms = np.sqrt(np.diag(products))
    mean = share / (norms + eps)
    length = math.sqrt(max(0.0, mean @ products @ mean))
    if length < eps:
        if len(weights) == 2:
            return share
        raise TransformError(
            f"{where}: the weighted directions cancel out, so their mean has no direction: change the weights."
        )
    return mean / length * float(norms @ share)


def karcher(products: np.ndarray, *, max_iter: int, tol: float) -> np.ndarray:
    """Returns the coefficients [N] of the Riemannian mean of the directions, with the mean of the norms."""
    count = len(products)
    if count == 1:
        return np.ones(1)
    norms = np.sqrt(np.diag(products))
    valid = norms > tol
    if not valid.any():
        return np.zeros(count)
    units = np.diag(np.where(valid, 1 / np.where(norms > 0, norms, 1), 0))  # rows: coefficients
    share = valid / valid.sum()
    mean = share @ units
    length = _length(products, mean)
    mean = units[int(np.argmax(valid))] if length < tol else mean / length
    for _ in range(max_iter):
        tangent = np.zeros(count)
        for alpha, unit in zip(share, units, strict=True):
            dot = float(np.clip(mean @ products @ unit, -1, 1))
            angle = math.acos(dot)
            if alpha and angle >= tol:
                # Opposite directions have no shortest arc; sin is then the rounding error of pi.
                tangent += alpha * angle / math.sin(angle) * (unit - dot * mean)
        length = _length(products, tangent)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        length = _length(products, mean)
        if length > tol:
            mean = mean / length
    return mean * float(norms.mean())


def _length(products: np.ndarray, coefficients: np.ndarray) -> float:
    return math.sqrt(max(0.0, coefficients @ products @ coefficients))


def stock_share(products: np.ndarray) -> np.ndarray:
    """Returns the share of the models' mean in Model Stock, from the inner products of their deltas.

    It is N c / (1 + (N - 1) c), with c the mean cosine of two deltas; 0 at its pole.
    """
    count = len(products)
    norms = np.sqrt(np.array([products[i, i] for i in range(count)]))
    cosines = [
        np.clip(products[i, j] / np.maximum(norms[i] * norms[j], 1e-6), -1, 1)
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = np.mean(cosines, axis=0)
    below = 1 + (count - 1) * cosine
    pole = np.abs(below) < 1e-6
    return np.where(pole, 0, count * cosine / np.where(pole, 1, below))
