"""Scores of documents: one pass over the documents for all queries.

A score is grad f(query)^T (G + lambda)^-1 grad L(document), without sign change and without 1/N: positive means that more
weight on the document raises the completion's log-probability. One copy more among N documents changes it by about score / N.

Shapes: B documents of a batch, Q queries, L layers.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np

from espalier.common.bars import Bar
from espalier.trainers.influence import documents
from espalier.trainers.influence.consumers import Scores
from espalier.trainers.influence.fit import Reader
from espalier.trainers.influence.queries import QuerySet, total_scores
from espalier.trainers.influence.sites import Site
from espalier.trainers.scoring.scoring import Row

LEAST_NORMS = 1e-30  # what a cosine divides by at least


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
    """Yields the scores of documents, in their order; those without a target are 0.

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
