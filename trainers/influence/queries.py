"""Gradients of queries: preconditioned, compressed to low rank, and how much of them compression keeps.

A query is a prompt with a completion; its loss is the completion's negative log-likelihood. Only the compressed factors
stay in memory while documents stream.

Shapes: Q queries, L layers, E experts, X inputs, Y outputs, r rank; V matrices [L, Q, E, X, Y].
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from espalier.common.bars import Bar
from espalier.trainers.influence import documents, files, spread
from espalier.trainers.influence.consumers import Gradients, Scores, whole
from espalier.trainers.influence.documents import Reader
from espalier.trainers.influence.sites import Site
from espalier.trainers.scoring.scoring import Row

QueryDtype = Literal["bfloat16", "float32", "float64", "int8"]
# (gradients by site [L, Q, E, X, Y]) -> preconditioned gradients.
Precondition = Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]]
_EXACT_SVD = 512  # largest smaller side of a matrix that is decomposed whole
_OVERSAMPLED, _POWER_STEPS = 8, 2
Inputs = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuerySet:
    """Queries that are ready to score documents.

    Attributes:
      inputs: inputs of `Scores` by site: `p`, or `u` and `v`; int8 ones with their scales.
      nats: negative log-likelihood of each completion, I(y_c).
      norms: norms of the gradients before preconditioning.
      kept: share of the squared norm of the preconditioned gradients that compression keeps.
      pearson: correlation of compressed and full scores over sample documents; NaN without a sample or compression.
      notes: what a refinement reports, by query.
    """

    inputs: Inputs
    nats: np.ndarray
    norms: np.ndarray
    kept: np.ndarray
    pearson: np.ndarray
    notes: list[Any] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.nats)


def gradients(
    reader: Reader, sites: Mapping[str, Site], rows: Sequence[Row], *, dtype: str = "float32"
) -> Any:
    """Yields (gradients by site [L, B, E, X, Y], negative log-likelihoods [B]) of batches of rows, in order."""
    run = reader.compiled(sites, Gradients(dtype))
    size = reader.batch_size
    for first in range(0, len(rows), size):
        chosen = rows[first : first + size]
        longest = max(row.inputs for row in chosen)
        length = documents.bucket_length(longest, limit=reader.model.max_length)
        arrays = documents.columns(chosen, range(first, first + len(chosen)), size, length)
        results, nll_BT = run(reader.params, {}, reader.place(arrays), None)
        count = len(chosen)
        own = {
            path: jax.lax.slice_in_dim(value, 0, count, axis=len(sites[path].scan))
            for path, value in results.items()
        }
        nats_B = np.asarray((nll_BT * arrays["decoder_loss_weights"]).sum(-1), np.float64)
        yield own, nats_B[:count]


def prepare(
    reader: Reader,
    sites: Mapping[str, Site],
    rows: Sequence[Row],
    precondition: Precondition | None,
    *,
    rank: int | None,
    store_dtype: QueryDtype = "bfloat16",
    dtype: str = "float32",
    sample: Sequence[Row] = (),
    of_sample: Reader | None = None,
    refine: Callable[[Mapping[str, jax.Array]], tuple[Mapping[str, jax.Array], Any]] | None = None,
) -> QuerySet:
    """Returns the queries' gradients, preconditioned and compressed.

    Args:
      reader, sites: the model and its sites.
      rows: prompts and completions.
      precondition: multiplies gradients by the inverse curvature; None for none.
      rank: rank of the factors; None, or at least the smaller side of a matrix, for whole matrices.
      store_dtype: dtype of the factors. Whole matrices of a query set without `rank` stay in `dtype`.
      dtype: dtype of gradients and sums.
      sample: documents over which compressed and full scores are compared.
      of_sample: the model of the documents, if it is another.
      refine: (gradients of one query [L, E, X, Y]) -> (preconditioned gradients, a note), instead of `precondition`.
    """
    parts: list[Inputs] = []
    nats, norms, kept, pearson, notes = [], [], [], [], []
    compress = Compression(rank, store_dtype if rank is not None else dtype)
    with Bar(total=len(rows), desc="queries", unit="query") as progress:
        for grads, nats_B in gradients(reader, sites, rows, dtype=dtype):
            if refine is not None:
                full, more = _each(refine, sites, grads, len(nats_B))
                notes += more
            else:
                full = grads if precondition is None else precondition(grads)
            own = {path: compress(full[path]) for path in sites}
            nats.append(nats_B)
            norms.append(np.sqrt(_squares(sites, grads)))
            errors = {p: full[p].astype(dtype) - whole(own[p], dtype) for p in sites}
            total = np.maximum(_squares(sites, full), 1e-300)
            kept.append(1 - _squares(sites, errors) / total)
            pearson.append(
                _fidelity(of_sample or reader, sites, own, full, sample, len(nats_B), dtype)
            )
            parts.append(spread.on_host(own))
            progress.update(len(nats_B))
    return QuerySet(
        inputs=concatenated(sites, parts),
        nats=np.concatenate(nats),
        norms=np.concatenate(norms),
        kept=np.concatenate(kept),
        pearson=np.concatenate(pearson),
        notes=notes,
    )


def concatenated(sites: Mapping[str, Site], parts: Sequence[Inputs]) -> Inputs:
    """Returns the inputs of several sets of queries as one set."""
    return {
        path: {
            name: np.concatenate([part[path][name] for part in parts], axis=len(site.scan))
            for name in parts[0][path]
        }
        for path, site in sites.items()
    }


def joined(sites: Mapping[str, Site], sets: Sequence[QuerySet]) -> QuerySet:
    """Returns several query sets as one, in order, so that one pass over the documents scores all of them."""
    columns = {name: np.concatenate([getattr(one, name) for one in sets]) for name in _COLUMNS}
    notes = [note for one in sets for note in one.notes]
    return QuerySet(
        inputs=concatenated(sites, [one.inputs for one in sets]), notes=notes, **columns
    )


def _each(refine: Any, sites: Mapping[str, Site], grads: Any, count: int) -> tuple[Any, list[Any]]:
    """Refines the queries of a batch one after the other."""
    results, notes = [], []
    for b in range(count):
        one = {p: jnp.take(g, b, axis=len(sites[p].scan)) for p, g in grads.items()}
        refined, note = refine(one)
        results.append(refined)
        notes.append(note)
    stacked = {
        p: jnp.stack([r[p] for r in results], axis=len(site.scan)) for p, site in sites.items()
    }
    return stacked, notes


def _squares(sites: Mapping[str, Site], v: Mapping[str, jax.Array]) -> np.ndarray:
    """Returns the squared norm of each query's matrices, summed over sites in float64."""
    total = 0.0
    for path, site in sites.items():
        rows = jnp.square(jnp.moveaxis(v[path], len(site.scan), 0)).sum(-1)
        total = total + spread.on_host(rows).astype(np.float64).reshape(len(rows), -1).sum(-1)
    return np.asarray(total)


@dataclasses.dataclass(frozen=True)
class Compression:
    """Makes factors u v^T of matrices; singular values are in u.

    Attributes:
      rank: r, None for whole matrices.
      dtype: dtype of the factors; of int8, each column has a scale of its own, float32.
    """

    rank: int | None
    dtype: str

    def __call__(self, v: jax.Array) -> dict[str, jax.Array]:
        if self.rank is None or self.rank >= min(v.shape[-2:]):
            named = {"p": v}
        else:
            named = dict(zip(("u", "v"), low_rank(v, self.rank), strict=True))
        if self.dtype != "int8":
            return {name: x.astype(self.dtype) for name, x in named.items()}
        result: dict[str, jax.Array] = {}
        for name, x in named.items():
            scales = (jnp.abs(x).max(-2) / 127).astype(jnp.float32)
            steps = x / jnp.where(scales > 0, scales, 1)[..., None, :]
            result |= {name: jnp.round(steps).astype(jnp.int8), f"{name}_scale": scales}
        return result


@functools.partial(jax.jit, static_argnums=1)
@jax.default_matmul_precision("highest")
def low_rank(v: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Returns u [..., X, r] and w [..., Y, r] with u w^T close to v: the truncated SVD of small matrices.

    Large matrices are first projected on a random range with power iterations (Halko et al., arXiv 0909.4061).
    """
    if min(v.shape[-2:]) <= max(_EXACT_SVD, 2 * rank):
        basis, small = None, v
    else:
        omega = jax.random.normal(jax.random.key(0), (v.shape[-1], rank + _OVERSAMPLED), v.dtype)
        basis = jnp.linalg.qr(v @ omega)[0]
        for _ in range(_POWER_STEPS):
            basis = jnp.linalg.qr(v @ jnp.linalg.qr(jnp.swapaxes(v, -1, -2) @ basis)[0])[0]
        small = jnp.swapaxes(basis, -1, -2) @ v
    left, values, right = jnp.linalg.svd(small, full_matrices=False)
    u = left[..., :rank] * values[..., None, :rank]
    u = u if basis is None else basis @ u
    return u, jnp.swapaxes(right[..., :rank, :], -1, -2)


def _fidelity(
    reader: Reader,
    sites: Mapping[str, Site],
    own: Any,
    full: Any,
    sample: Sequence[Row],
    count: int,
    dtype: str,
) -> np.ndarray:
    """Returns Pearson correlations of compressed and full scores over the sample documents, by query."""
    if len(sample) < 3 or all(set(kinds) == {"p"} for kinds in own.values()):
        return np.full(count, np.nan)
    run = reader.compiled(sites, Scores(count, dtype=dtype))
    columns: list[list[np.ndarray]] = [[], []]
    both = (own, {p: {"p": full[p]} for p in sites})
    for _, arrays in reader.batches(sample, 0):
        placed = reader.place(arrays)
        for column, inputs in zip(columns, both, strict=True):
            results, _ = run(reader.params, inputs, placed, None)
            column.append(np.asarray(total_scores(sites, results)[0], np.float64))
    compressed, exact = (np.concatenate(column).T for column in columns)
    with np.errstate(invalid="ignore"):
        return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(compressed, exact, strict=True)])


def total_scores(sites: Mapping[str, Site], results: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns scores and squared norms of documents, summed over sites and layers."""
    scores: Any = 0.0
    squares: Any = 0.0
    for path, site in sites.items():
        own = results[path]
        scores += own["scores"].sum(0) if site.scan else own["scores"]
        squares += own["squares"].sum(0) if site.scan else own["squares"]
    return scores, squares


_COLUMNS = ("nats", "norms", "kept", "pearson")


def save(folder: Any, queries: QuerySet, record: Mapping[str, Any]) -> None:
    """Writes a query set and a record of what it was made from."""
    arrays = files.named(queries.inputs)
    arrays |= {f"queries:{name}": getattr(queries, name) for name in _COLUMNS}
    files.write(folder, arrays, {**record, "notes": queries.notes})


def load(folder: Any) -> tuple[QuerySet, dict[str, Any]]:
    """Returns a query set and its record; raises StageError if it is damaged."""
    arrays, record = files.read(folder)
    by_site = files.by_site(arrays)
    own = by_site.pop("queries")
    return QuerySet(inputs=by_site, notes=record.get("notes", []), **own), record
