"""What a damping does on documents of one's own: whether each is first for its own second half.

A query is the second half of a document after the first half. The document itself should be at the top of its ranking; with too
large a damping, documents of long gradients are there instead. Only the eigenvalues change from one damping to the next.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from espalier.trainers.influence import fit, kronecker, queries, scores, spread
from espalier.trainers.influence.sites import Site
from espalier.trainers.scoring.scoring import Row

DAMPINGS = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
RANK = 64
_LEAST = 4  # targets of a document that is halved


@dataclasses.dataclass(frozen=True)
class Recall:
    """The documents' ranks for their own second halves.

    Attributes:
      damping: relative; None for products of gradients without a curvature.
      ranks: from 1.
    """

    damping: float | None
    ranks: np.ndarray

    @property
    def first(self) -> float:
        """The share of documents that are first."""
        return float((self.ranks == 1).mean())


def halved(row: Row) -> Row:
    """Returns the second half of a document's targets as a query."""
    half = len(row.targets) // 2
    return dataclasses.replace(
        row, context=[*row.context, *row.targets[:half]], targets=row.targets[half:]
    )


def recalls(
    reader: fit.Reader,
    folder: pathlib.Path,
    sites: Mapping[str, Site],
    rows: Sequence[Row],
    *,
    asked: int,
    dtype: str = "float32",
    precision: kronecker.Precision = "highest",
) -> list[Recall]:
    """Returns the ranks of documents for their own second halves by EK-FAC with each of DAMPINGS, and without a curvature.

    Args:
      reader: the model and its batches.
      folder: folder of fitted stages.
      sites: the tapped sites.
      rows: documents, which are all ranked.
      asked: how many documents are queries: the first ones that are long enough.
      dtype: dtype of gradients and sums.
      precision: of the rotations.
    """
    own = [(i, halved(row)) for i, row in enumerate(rows) if len(row.targets) >= _LEAST][:asked]
    if not own:
        return []
    halves = [row for _, row in own]
    smallest = fit.read_curvature(
        *(folder, sites, "ekfac", kronecker.Damping(min(DAMPINGS))),
        reader=reader,
        precision=precision,
    )
    ways = [None, *DAMPINGS]
    compress = queries.Compression(RANK, "bfloat16")
    parts: list[list[queries.Inputs]] = [[] for _ in ways]
    for grads, _ in queries.gradients(reader, sites, halves, dtype=dtype):
        for value, own_parts in zip(ways, parts, strict=True):
            solved = grads
            if value is not None:
                solved = smallest.times(value / min(DAMPINGS))(grads)
            own_parts.append(spread.on_host({path: compress(solved[path]) for path in sites}))
    inputs = queries.concatenated(sites, [one for own_parts in parts for one in own_parts])
    unused = np.zeros(len(ways) * len(halves))
    ready = queries.QuerySet(inputs=inputs, nats=unused, norms=unused, kept=unused, pearson=unused)
    scored = scores.score(reader, sites, ready, rows, total=len(rows), dtype=dtype)
    every = np.split(np.array([one.scores for one in scored]), len(ways), axis=1)
    places = [i for i, _ in own]
    result = []
    for value, scores_NQ in zip(ways, every, strict=True):
        columns = zip(scores_NQ.T, places, strict=True)
        ranks = np.array([1 + (own_N > own_N[at]).sum() for own_N, at in columns])
        result.append(Recall(value, ranks))
    return result


def table(found: Sequence[Recall], count: int) -> list[str]:
    """Returns the recalls as lines of text; `count` is the number of ranked documents."""
    if not found:
        return []
    asked = len(found[0].ranks)
    lines = [f"{asked} documents among {count}, ranked for their own second halves:"]
    lines.append(f"  {'--damping':>11}  {'first':>6}  mean rank")
    for one in found:
        name = "dot product" if one.damping is None else f"{one.damping:g}"
        note = " (default)" if one.damping == kronecker.RELATIVE else ""
        lines.append(f"  {name:>11}  {one.first:>6.0%}  {one.ranks.mean():.1f}{note}")
    return lines
