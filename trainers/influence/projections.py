"""TRAK-style attribution: gradients in few random dimensions, and their second moment over documents there.

The features of a gradient are sum A^T D S [K, K] over its matrices D [X, Y], with independent random projections A [X, K] and S
[Y, K] of each matrix. In expectation they keep dot products of gradients. A document's score for a query is
phi(query)^T (M + lambda)^-1 phi(document) with the second moment M of the documents' features (Park et al., arXiv 2303.14186,
whose features are of the margin, and whose scores are means over several models; here both are of the loss and of one model).
Projections of both sides as in LoGra (Choe et al., arXiv 2405.13954) never form D.

A query's direction A W S^T is a matrix of rank K at most, so that documents are scored as with any other method.

Shapes: L layers, Q queries, B documents, T length, E experts, X inputs, Y outputs, R rows of experts; K side of the features,
F = K K features.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from espalier.common.bars import Bar
from espalier.model.moe.grouped_matmul import grouped_matmul
from espalier.trainers.influence import documents, spread
from espalier.trainers.influence.consumers import outer_by_group
from espalier.trainers.influence.documents import Reader
from espalier.trainers.influence.kronecker import Damping, FactorError
from espalier.trainers.influence.sites import Site
from espalier.trainers.scoring.scoring import Row

Projections = Mapping[str, Mapping[str, Any]]


def projection(rng: np.random.Generator, width: int, side: int) -> np.ndarray:
    """Returns a random A [width, side] with E[A] = 0 and E[A A^T] = I; A A^T = I exactly if the side is at least the width.

    Its rows or columns, whichever are fewer, are orthogonal and of random direction.
    """
    q, r = np.linalg.qr(rng.normal(size=(max(width, side), min(width, side))))
    # Without the signs of r, directions would not be uniform.
    q = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return q * np.sqrt(width / side) if width > side else q.T


def projections(
    sites: Mapping[str, Site], side: int, *, seed: int = 0, dtype: Any = np.float32
) -> dict[str, dict[str, np.ndarray]]:
    """Returns `a` [L, E, X, K] and `s` [L, E, Y, K] of every site, which depend only on the seed and the sites."""
    result: dict[str, dict[str, np.ndarray]] = {}
    for i, path in enumerate(sorted(sites)):
        site = sites[path]
        rng = np.random.default_rng([seed, i])
        count = int(np.prod(site.lead))
        result[path] = {
            name: np.stack([projection(rng, width, side) for _ in range(count)])
            .reshape(*site.lead, width, side)
            .astype(dtype)
            for name, width in (("a", site.inputs), ("s", site.outputs))
        }
    return result


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of each document, [B, K, K], summed over experts; inputs are `projections`.

    Attributes:
      side: K.
      dtype: dtype of the sums.
    """

    # Both uses of a tied matrix are projected at once, from its whole gradient.
    squares: ClassVar[bool] = True
    matrices: ClassVar[bool] = False

    side: int
    dtype: str = "float32"

    def zeros(self, site: Site, batch: int, length: int) -> Any:
        return jnp.zeros((*site.scan, batch, self.side, self.side), self.dtype)

    def dense(self, a_BTX, g_BTY, mask_BT, inputs):
        a_BTK, g_BTK = (
            a_BTX @ inputs["a"].astype(self.dtype),
            g_BTY @ inputs["s"].astype(self.dtype),
        )
        return jnp.einsum("btk,btm->bkm", a_BTK, g_BTK)

    def experts(self, a_RX, g_RY, rows, inputs):
        a_RK, g_RK = (
            jnp.where(
                rows.valid_R[:, None],
                grouped_matmul(x, inputs[name].astype(self.dtype), rows.sizes_E),
                0,
            )
            for x, name in ((a_RX, "a"), (g_RY, "s"))
        )
        sums = outer_by_group(a_RK, g_RK, rows.sizes_of_documents)
        return sums.reshape(-1, rows.batch, self.side, self.side).sum(0)

    def finish(self, site, gradient, inputs):
        return jnp.einsum("bxy,xk,ym->bkm", gradient, inputs["a"], inputs["s"])


def second_moment(
    reader: Reader,
    sites: Mapping[str, Site],
    own: Projections,
    rows: Iterable[Row],
    *,
    dtype: str = "float32",
    total: int | None = None,
) -> np.ndarray:
    """Returns the mean of phi phi^T over the documents with a target, float64 [F, F].

    Args:
      reader, sites: the model and its sites.
      own: projections of the sites.
      rows: documents, read once.
      dtype: dtype of a document's features.
      total: number of documents, for progress and remaining time.

    Raises:
      FactorError: no document has a target.
    """
    side = next(iter(own.values()))["a"].shape[-1]
    run = reader.compiled(sites, Features(side, dtype))
    inputs = jax.device_put(own, reader.whole)
    moment_FF, count = np.zeros((side * side, side * side)), 0
    with Bar(desc="projections", unit="document", total=total) as progress:
        for window in documents.windows(rows, reader.batch_size):
            for indices, arrays in reader.batches(window, 0):
                results, _ = run(reader.params, inputs, reader.place(arrays), None)
                phi_BF = features(sites, jax.device_get(results))[: len(indices)]
                moment_FF += phi_BF.T @ phi_BF
                count += len(indices)
                progress.update(len(indices))
    if not count:
        raise FactorError(
            "The documents have no token to predict: give documents of two tokens or more."
        )
    return moment_FF / count


def features(sites: Mapping[str, Site], results: Mapping[str, Any]) -> np.ndarray:
    """Returns the sum over sites and layers of a consumer's results, float64 [B, F]."""
    total: Any = 0.0
    for path, site in sites.items():
        own = np.asarray(results[path], np.float64)
        total = total + (own.sum(0) if site.scan else own)
    return total.reshape(len(total), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class ProjectedCurvature:
    """The damped inverse of the features' second moment: what preconditions a query's gradient.

    Attributes:
      sites: by path.
      own: projections of the sites.
      inverse_FF: (M + lambda)^-1.
    """

    sites: Mapping[str, Site]
    own: Projections
    inverse_FF: np.ndarray

    @classmethod
    def of(
        cls,
        sites: Mapping[str, Site],
        own: Projections,
        moment_FF: np.ndarray,
        damping: Damping,
    ) -> "ProjectedCurvature":
        """Returns the inverse, with a damping relative to the moment's mean eigenvalue, or absolute."""
        size = len(moment_FF)
        mean = np.trace(moment_FF) / size if damping.kind == "relative" else 1.0
        added = damping.value * mean
        if not added > 0:
            raise FactorError("The gradients of all documents are zero, so that none has a score.")
        return cls(sites, own, np.linalg.inv(moment_FF + added * np.eye(size)))

    def __call__(self, v: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns directions A W S^T by site, of the shapes [L, Q, E, X, Y] of the queries' gradients."""
        phi: Any = 0.0
        for path, site in self.sites.items():
            lead, batch = _labels(site)
            terms = f"{batch}xy,{lead}xk,{lead}ym->qkm"
            phi = phi + _contracted(terms, v[path], self.own[path]["a"], self.own[path]["s"])
        Q, K, _ = phi.shape
        solved_QF = spread.on_host(phi).astype(np.float64).reshape(Q, K * K) @ self.inverse_FF
        w_QKK = jnp.asarray(solved_QF.reshape(Q, K, K), phi.dtype)
        result = {}
        for path, site in self.sites.items():
            lead, batch = _labels(site)
            terms = f"qkm,{lead}xk,{lead}ym->{batch}xy"
            result[path] = _contracted(terms, w_QKK, self.own[path]["a"], self.own[path]["s"])
        return result


def _labels(site: Site) -> tuple[str, str]:
    """Returns the leading dimensions of a site's projections, and of gradients of queries, as letters of `einsum`."""
    layers, experts = "l" if site.scan else "", "e" if site.stack else ""
    return f"{layers}{experts}", f"{layers}q{experts}"


@functools.partial(jax.jit, static_argnums=0)
def _contracted(terms: str, x: Any, a: Any, s: Any) -> jax.Array:
    return jnp.einsum(terms, x, a.astype(x.dtype), s.astype(x.dtype))
