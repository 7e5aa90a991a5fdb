"""Which layers, matrices and tokens carry influence.

Shapes: L layers, Q queries.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_TENTH = 0.1
_SHOWN = 10


_BLOCK = re.compile(r"/block_(\d+)(?=/|$)")


def block_of(path: str) -> int | None:
    """Returns the number of the block in a path of parameters; None without one.

    Where layers are scanned, it is the place in a period of the layer pattern, otherwise the layer.
    """
    numbers = _BLOCK.findall(path)
    return int(numbers[0]) if numbers else None


class LayerSums:
    """Sums of the scores of top documents by matrix and layer.

    Args:
      wanted: documents of each query.
    """

    def __init__(self, wanted: Sequence[Iterable[int]]):
        self._queries: dict[int, list[int]] = {}
        for q, documents in enumerate(wanted):
            for document in documents:
                self._queries.setdefault(document, []).append(q)
        self._sums: list[dict[tuple[str, int | None], float]] = [{} for _ in wanted]

    def add(self, document: int, layers: Mapping[str, Any]) -> None:
        """Adds the scores of one document by matrix: [Q], or [L, Q] of scanned layers, which have all blocks of a period."""
        period = 1 + max((block_of(path) or 0 for path in layers), default=0)
        for q in self._queries.get(document, ()):
            sums = self._sums[q]
            for path, values in layers.items():
                own, block = np.asarray(values, np.float64), block_of(path)
                parts = (
                    {block: own[q]}
                    if own.ndim == 1
                    else {(block or 0) + period * i: x for i, x in enumerate(own[:, q])}
                )
                for layer, value in parts.items():
                    key = (path, layer)
                    sums[key] = sums.get(key, 0.0) + float(value)

    def shares(self, queries: Sequence[int]) -> dict[str, dict[str, float]]:
        """Returns shares of the summed score as means over queries, by layer and by matrix; both add up to 1.

        A share is negative where a layer pulls against the others. Queries whose sum is not positive do not count.
        """
        by_layer: Counter[str] = Counter()
        by_matrix: Counter[str] = Counter()
        count = 0
        for q in queries:
            total = sum(self._sums[q].values())
            if total <= 0:
                continue
            count += 1
            for (path, layer), value in self._sums[q].items():
                by_layer["other" if layer is None else str(layer)] += value / total
                by_matrix[_BLOCK.sub("", path)] += value / total
        return {
            name: {key: value / count for key, value in own.items()} if count else {}
            for name, own in (("layers", by_layer), ("matrices", by_matrix))
        }


def tenth_share(scores: Sequence[float]) -> float:
    """Returns the share of the summed absolute influence that a tenth of the tokens has, those with most; NaN without any."""
    sizes = np.sort(np.abs(np.asarray(scores, np.float64)))[::-1]
    if not sizes.sum():
        return math.nan
    return float(sizes[: max(1, math.ceil(_TENTH * len(sizes)))].sum() / sizes.sum())


def token_table(
    rows: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """Returns for each group of queries how token influence is distributed, and the tokens with most of it.

    Args:
      rows: `query`, `document`, `scores` and `texts` of the tokens, `spurious`, of top documents.
      groups: queries by name.
    """
    result = []
    for group, queries in groups.items():
        own = [row for row in rows if row["query"] in queries]
        if not own:
            continue
        sums: Counter[str] = Counter()
        for row in own:
            for text, score in zip(row["texts"], row["scores"], strict=True):
                sums[text.strip()] += score
        del sums[""]
        shares = [tenth_share(row["scores"]) for row in own]
        shares = [share for share in shares if not math.isnan(share)]
        result.append(
            {
                **{"group": group, "documents": len(own)},
                "spurious": sum(bool(row["spurious"]) for row in own),
                "tenth_share": float(np.mean(shares)) if shares else None,
                "tokens": [[text, total] for text, total in sums.most_common(_SHOWN)],
            }
        )
    return result
