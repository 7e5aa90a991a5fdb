"""Eigendecomposed Kronecker factors, damping, and inverse-Hessian-vector products.

EK-FAC (Grosse et al., arXiv 2308.03296): the curvature of a matrix is Q diag(Lambda) Q^T with Q = Q_A x Q_S from the
covariances of inputs and gradients, and Lambda the mean over documents of the squared gradient in that basis. K-FAC takes
the products of both factors' eigenvalues for Lambda.

Factors are in blocks: a side of d dimensions is split into n blocks of s = ceil(d / n), padded with zeros. A covariance is then
[n, s, s], and its eigenvectors are block-diagonal. With n = 1 nothing is split. Padding has no variance, so it changes no
result.

Shapes: L layers, E experts ('...' any of both), d dimensions of a side, n blocks of size s, X inputs, Y outputs; X', Y' the
padded widths n s.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from espalier.trainers.influence.sites import Site

# Of products on accelerators, which round the operands of float32 products by default: to bfloat16 on TPUs, to 10 bits on GPUs.
# Rounded, rotations into the eigenbasis are wrong by about 0.1 to 4 %, and most where eigenvalues are small.
Precision = Literal["highest", "high", "default"]
RELATIVE = 1e-4  # finds the documents of facts where 0.1 does not: docs/use/influence_explained.md
DampingKind = Literal["relative", "absolute"]
Strategy = Literal["ekfac", "kfac"]


def block_size(width: int, blocks: int) -> int:
    """Returns s."""
    return -(-width // blocks)


def padded_width(width: int, blocks: int) -> int:
    """Returns n s, the width of rotated vectors."""
    return blocks * block_size(width, blocks)


def split(x: jax.Array, blocks: int) -> jax.Array:
    """Reshapes [..., d] -> [..., n, s], padded by zeros."""
    size = block_size(x.shape[-1], blocks)
    missing = blocks * size - x.shape[-1]
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], blocks, size)


def rotate(x: jax.Array, q_NSK: jax.Array) -> jax.Array:
    """Returns x Q for vectors [..., d]: their coordinates [..., n s] in the eigenbasis."""
    parts = split(x, q_NSK.shape[0])
    return _joined(jnp.einsum("...ns,nsk->...nk", parts, q_NSK.astype(x.dtype)))


def rotate_back(x: jax.Array, q_NSK: jax.Array, width: int) -> jax.Array:
    """Returns x Q^T [..., d] for coordinates [..., n s], the inverse of `rotate`."""
    parts = x.reshape(*x.shape[:-1], *q_NSK.shape[:2])
    return _joined(jnp.einsum("...nk,nsk->...ns", parts, q_NSK.astype(x.dtype)))[..., :width]


def rotate_matrix(v_XY: jax.Array, qa: jax.Array, qs: jax.Array) -> jax.Array:
    """Returns Q_A^T V Q_S of a matrix [X, Y], in the padded widths."""
    return rotate(rotate(v_XY, qs).T, qa).T


def rotate_matrix_back(v: jax.Array, qa: jax.Array, qs: jax.Array, shape) -> jax.Array:
    """Returns Q_A V Q_S^T [X, Y], the inverse of `rotate_matrix`."""
    inputs, outputs = shape
    return rotate_back(rotate_back(v, qs, outputs).T, qa, inputs).T


def _joined(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1)


class FactorError(ValueError):
    """Factors that are not finite, or a damping that is not positive."""


@dataclasses.dataclass(frozen=True)
class Damping:
    """What is added to the eigenvalues of a matrix: lambda in (G + lambda)^-1, for EK-FAC and for conjugate gradients.

    Attributes:
      value: the added number, or the factor on the mean eigenvalue of the matrix.
      kind: 'relative' to the mean eigenvalue of each matrix by EK-FAC (by K-FAC for K-FAC), or 'absolute', one number for all.

    Raises:
      FactorError: the value is not positive.
    """

    value: float = RELATIVE
    kind: DampingKind = "relative"

    def __post_init__(self):
        if not (np.isfinite(self.value) and self.value > 0):
            raise FactorError(
                f"--damping={self.value} must be a positive number: without it, directions of no curvature have no inverse."
            )

    def of(self, site: Site, eigenvalues: np.ndarray) -> np.ndarray:
        """Returns the damping of each matrix, float64 [..., 1, 1].

        Relative damping of an expert is at least that of the mean over its layer's experts, so that an expert without
        tokens has some.
        """
        if self.kind == "absolute":
            return np.full((*eigenvalues.shape[:-2], 1, 1), self.value)
        # Padding has no eigenvalues.
        mean = eigenvalues.sum((-2, -1), keepdims=True) / (site.inputs * site.outputs)
        if site.experts is not None:
            mean = np.maximum(mean, mean.mean(-3, keepdims=True))
        return self.value * mean


def eigendecomposition(
    sums: Mapping[str, np.ndarray],
    *,
    name: str,
    dtype: Any = np.float32,
    eigh: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = np.linalg.eigh,
) -> dict[str, np.ndarray]:
    """Returns `qa`, `qs` [..., n, s, s] and eigenvalues `la`, `ls` [..., n, s] of sums over tokens, decomposed in float64.

    Args:
      sums: `a` and `s`, or one of them, and `count`, the number of tokens.
      name: the site, for errors.
      dtype: dtype of the eigenvectors; eigenvalues are float64.
      eigh: decomposes a stack of symmetric matrices.

    Raises:
      FactorError: a sum is not finite.
    """
    count = np.maximum(np.asarray(sums["count"], np.float64), 1.0)[..., None, None, None]
    result = {}
    for side in (side for side in ("a", "s") if side in sums):
        mean = np.asarray(sums[side], np.float64) / count
        if not np.isfinite(mean).all():
            raise FactorError(
                f"The covariance '{side}' of {name} is not finite: accumulate in float32 or wider (--factor_dtype), or "
                "remove the documents whose loss is not finite."
            )
        values, vectors = eigh((mean + np.swapaxes(mean, -1, -2)) / 2)
        result[f"q{side}"] = vectors.astype(dtype)
        result[f"l{side}"] = np.maximum(values, 0.0)
    return result


def kfac_eigenvalues(eigen: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the products of both factors' eigenvalues, float64 [..., X', Y']."""
    la, ls = (
        np.asarray(eigen[name], np.float64).reshape(*eigen[name].shape[:-2], -1)
        for name in ("la", "ls")
    )
    return la[..., :, None] * ls[..., None, :]


def reciprocals(site: Site, eigenvalues: np.ndarray, damping: Damping) -> np.ndarray:
    """Returns 1 / (Lambda + lambda), float64 [..., X', Y']; 0 where both are 0, as gradients are."""
    eigenvalues = np.asarray(eigenvalues, np.float64)
    damped = eigenvalues + damping.of(site, eigenvalues)
    return np.divide(1.0, damped, out=np.zeros_like(damped), where=damped > 0)


def apply_eigen(
    site: Site, eigen: Mapping[str, Any], factors: Any, v: jax.Array, *, batched: bool = True
) -> jax.Array:
    """Returns Q_A ((Q_A^T V Q_S) * factors) Q_S^T of matrices: with reciprocals, the inverse-Hessian-vector product.

    Args:
      eigen: `qa` and `qs`.
      factors: [..., X', Y'], such as `reciprocals`.
      v: matrices [L, Q, E, X, Y], without the dimensions that the site does not have.
      batched: whether v has the dimension Q.
    """

    return _apply(site, batched, v, eigen["qa"], eigen["qs"], factors)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(
    site: Site, batched: bool, v: jax.Array, qa: jax.Array, qs: jax.Array, factors: jax.Array
) -> jax.Array:
    def one(v_XY: jax.Array, qa: jax.Array, qs: jax.Array, factors: jax.Array) -> jax.Array:
        rotated = rotate_matrix(v_XY, qa, qs)
        return rotate_matrix_back(rotated * factors.astype(v.dtype), qa, qs, v_XY.shape)

    mapped: Callable[..., jax.Array] = one
    if site.experts is not None:
        mapped = jax.vmap(mapped)
    if batched:
        mapped = jax.vmap(mapped, in_axes=(0, None, None, None))
    if site.layers is not None:
        mapped = jax.vmap(mapped)
    return mapped(v, qa, qs, factors)


@dataclasses.dataclass(frozen=True, eq=False)
class Curvature:
    """The damped inverse curvature of all sites, for one strategy and damping.

    Attributes:
      sites: by path.
      eigen: `qa` and `qs` by path.
      inverse: reciprocals of the damped eigenvalues, by path.
      damping: the number added to the eigenvalues, [..., 1, 1] by path.
      precision: of the rotations.
    """

    sites: Mapping[str, Site]
    eigen: Mapping[str, Mapping[str, Any]]
    inverse: Mapping[str, Any]
    damping: Mapping[str, Any]
    precision: Precision = "highest"

    @classmethod
    def of(
        cls,
        sites: Mapping[str, Site],
        eigen: Mapping[str, Mapping[str, Any]],
        squares: Mapping[str, Any] | None,
        damping: Damping,
        *,
        dtype: Any = np.float32,
        place: Callable[[Any], Any] = np.asarray,
        precision: Precision = "highest",
    ) -> "Curvature":
        """Returns the curvature by EK-FAC with `squares`, the corrected eigenvalues, or by K-FAC without them.

        Args:
          sites: by path.
          eigen: `qa`, `qs`, `la`, `ls` by path: arrays, or tensors of files, of which one layer at a time is in float64.
          squares: corrected eigenvalues by path, likewise.
          damping: is added to the eigenvalues.
          dtype: dtype of the reciprocals.
          place: makes the curvature's arrays, such as `Reader.place_spread`.
          precision: of the rotations.
        """
        inverse, added = {}, {}
        for path, site in sites.items():
            widths = [
                eigen[path][name].shape[-3] * eigen[path][name].shape[-1] for name in ("qa", "qs")
            ]
            reciprocal = np.empty((*site.lead, *widths), dtype)
            added[path] = np.empty((*site.lead, 1, 1), dtype)
            for layer in np.ndindex(site.scan):
                if squares is None:
                    values = kfac_eigenvalues({n: eigen[path][n][layer] for n in ("la", "ls")})
                else:
                    values = np.asarray(squares[path][layer], np.float64)
                reciprocal[layer] = reciprocals(site, values, damping)
                added[path][layer] = damping.of(site, values)
            inverse[path] = place(reciprocal)
        return cls(
            sites=sites,
            eigen={p: {name: place(eigen[p][name]) for name in ("qa", "qs")} for p in sites},
            inverse=inverse,
            damping=added,
            precision=precision,
        )

    def times(self, factor: float) -> "Curvature":
        """Returns the curvature with `factor` times the damping; a factor of at least 1 loses no precision."""
        inverse, added = {}, {}
        for path, own in self.inverse.items():
            more = np.asarray(self.damping[path] * (factor - 1)).astype(own.dtype)
            # 1 / (Lambda + factor lambda) from 1 / (Lambda + lambda)
            inverse[path] = own / (1 + own * more)
            added[path] = self.damping[path] * np.asarray(factor, self.damping[path].dtype)
        return dataclasses.replace(self, inverse=inverse, damping=added)

    def __call__(self, v: Mapping[str, jax.Array], *, batched: bool = True) -> dict[str, jax.Array]:
        """Returns (G + lambda)^-1 V by site; see `apply_eigen`."""
        with jax.default_matmul_precision(self.precision):
            return {
                path: apply_eigen(
                    site, self.eigen[path], self.inverse[path], v[path], batched=batched
                )
                for path, site in self.sites.items()
            }
