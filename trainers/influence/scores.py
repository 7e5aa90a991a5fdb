"""Scores of documents: one pass over the documents for all queries. Scores of the single tokens of a document.

A score is grad f(query)^T (G + lambda)^-1 grad L(document), without sign change and without 1/N: positive means that more
weight on the document raises the completion's log-probability. One copy more among N documents changes it by about score / N.
Those of single tokens need forward passes alone; a document is spurious if one or two tokens have its influence.

Shapes: B documents of a batch, T length, Q queries, L layers.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.common.bars import Bar
from espalier.model.kernels.platform import use_reference_forms
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.influence import documents
from espalier.trainers.influence.conjugate import Matrices, logits_of, tangents, with_changed
from espalier.trainers.influence.consumers import Scores
from espalier.trainers.influence.documents import Reader
from espalier.trainers.influence.queries import QuerySet, total_scores
from espalier.trainers.influence.sites import Site
from espalier.trainers.objectives.base import Batch
from espalier.trainers.scoring.scoring import Row

LEAST_NORMS = 1e-30  # what a cosine divides by at least
SPURIOUS = 2 / 3


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of one document.

    Attributes:
      scores: by query [Q].
      norm: norm of the document's gradient over the sites.
      layers: scores [L, Q] or [Q] by site; None unless asked for.
    """

    scores: np.ndarray
    norm: float
    layers: Mapping[str, np.ndarray] | None = None


def score(
    reader: Reader,
    sites: Mapping[str, Site],
    queries: QuerySet,
    rows: Iterable[Row],
    *,
    first: int = 0,
    per_layer: bool = False,
    cosine: bool = False,
    total: int | None = None,
    dtype: str = "float32",
) -> Iterator[Scored]:
    """Yields the scores of documents, in their order; the scores of documents without a target are 0.

    Args:
      reader, sites, queries: see `queries.prepare`.
      rows: documents, read once.
      first: number of documents before the first of `rows`, for progress.
      per_layer: whether to return the scores of each site too.
      cosine: divides by the norms of both gradients.
      total: number of documents, for progress and remaining time.
      dtype: dtype of sums.
    """
    run = reader.compiled(sites, Scores(queries.size, dtype=dtype))
    inputs = reader.place_spread(queries.inputs)
    with Bar(desc="scores", unit="document", total=total, initial=first) as progress:
        for window in documents.windows(rows, reader.batch_size):
            scored: dict[int, Scored] = {}
            for indices, arrays in reader.batches(window, 0):
                results, _ = run(reader.params, inputs, reader.place(arrays), None)
                results = jax.device_get(results)
                for b, index in enumerate(indices):
                    scored[index] = _document(sites, queries, results, b, per_layer, cosine)
                progress.update(len(indices))
            empty = Scored(np.zeros(queries.size), 0.0, {} if per_layer else None)
            yield from (scored.get(i, empty) for i in range(len(window)))


def _document(sites, queries, results, b, per_layer, cosine) -> Scored:
    """Returns the scores of row b of a batch."""
    own = {
        path: {name: np.take(x, b, axis=len(sites[path].scan)) for name, x in kinds.items()}
        for path, kinds in results.items()
    }
    scores, square = total_scores(sites, own)
    norm = float(np.sqrt(square))
    divisor = np.maximum(queries.norms * norm, LEAST_NORMS) if cosine else 1.0
    layers = {path: kinds["scores"] / divisor for path, kinds in own.items()} if per_layer else None
    return Scored(np.asarray(scores / divisor), norm, layers)


def output_token_scores(model: Any, sites: Mapping[str, Site]) -> Callable[..., jax.Array]:
    """Returns the compiled function (params, batch, matrices) -> scores [B, T] of the predicted tokens.

    A token's score is the change of its log-probability along the query's direction (G + lambda)^-1 grad log p(completion),
    which `jvp` computes exactly; a document's add up to its score. (Grosse et al., arXiv 2308.03296, take a difference
    quotient.)

    The function's `matrices` are one query's preconditioned gradient [L, E, X, Y] by site.
    """

    def scores(params: Any, batch: Batch, matrices: Matrices) -> jax.Array:
        flat = state_tree.flatten(params)
        # The loss is the negative log-probability: its gradient points the other way.
        change = {path: -x for path, x in tangents(sites, matrices, params).items()}

        def log_probs(own: Any) -> jax.Array:
            log_probs_BTV = jax.nn.log_softmax(logits_of(model, with_changed(params, own), batch))
            targets_BT1 = batch["decoder_target_tokens"][..., None]
            return jnp.take_along_axis(log_probs_BTV, targets_BT1, axis=-1)[..., 0]

        _, scores_BT = jax.jvp(log_probs, ({p: flat[p] for p in change},), (change,))
        return scores_BT * batch["decoder_loss_weights"].astype(scores_BT.dtype)

    compiled = jax.jit(scores)

    def call(params: Any, batch: Batch, matrices: Matrices) -> jax.Array:
        with use_reference_forms():
            return compiled(params, batch, matrices)

    return call


def concentration(scores: Any) -> float:
    """Returns the L2 norm of a document's token scores over their L1 norm: 1 if one token has all influence; 0 without any."""
    scores = np.asarray(scores, np.float64)
    total = np.abs(scores).sum()
    return float(np.sqrt(np.square(scores).sum()) / total) if total else 0.0


def is_spurious(scores: Any) -> bool:
    """Returns whether a document is marked as spurious: its influence is that of one or two tokens (Grosse et al.)."""
    return concentration(scores) > SPURIOUS
