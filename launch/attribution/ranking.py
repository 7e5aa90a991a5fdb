"""The top and bottom documents of each query, from a file of scores.

Scores are ranked as they are, and divided by the norm of the document's gradient, which long and repetitive documents win
less often.
"""

import heapq
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from data.text import documents
from launch.inference.row_files import RowFileError

_EXAMPLE = '{"scores": [0.1, ...], "norm": 2.0}'
_MAX_BYTES = 1 << 30


def queries_folder(scores: str) -> str:
    """Returns the folder of the queries' gradients and the record of a file of scores."""
    return f"{scores}.queries"


def top_file(scores: str) -> str:
    return f"{scores}.top.json"


def read_scores(path: str) -> Iterator[tuple[list[float], float | None]]:
    """Yields (scores, norm or None) of each document.

    Raises:
      RowFileError: a row is not of `launch.influence score`, or has another number of scores than the first.
      DataError: the file cannot be read.
    """
    size = None
    for number, row in documents.read_json_lines(pathlib.Path(path), example=_EXAMPLE):
        scores = row.get("scores")
        if not isinstance(scores, list) or size not in (None, len(scores)):
            raise RowFileError(
                f"{path}, line {number} is not a row of {size or 'the'} scores, such as {_EXAMPLE}: run `launch.influence "
                "score` again with another --out."
            )
        size = len(scores)
        yield scores, row.get("norm")


def write_top(scores: str, *, top: int) -> None:
    """Writes the `top` documents at both ends of each query's ranking to `top_file`."""
    best: list[dict[str, list[tuple[float, int, float]]]] = []
    count = 0
    for document, (row, norm) in enumerate(read_scores(scores)):
        if not best:
            names = ("top", "bottom", "top_per_norm", "bottom_per_norm")
            best = [{name: [] for name in names} for _ in row]
        for query, score in zip(best, row, strict=True):
            per_norm = score / norm if norm else 0.0
            for name, value in (("top", score), ("top_per_norm", per_norm)):
                # Of equal scores, the first document ranks first.
                _push(query[name], (value, -document, score), top)
                low = name.replace("top", "bottom")
                _push(query[low], (-value, -document, score), top)
        count = document + 1
    table = {
        "documents": count,
        "queries": [
            {
                name: [
                    {
                        "document": -item[1],
                        "score": item[2],
                        "value": abs(item[0]) and item[0] * sign,
                    }
                    for item in sorted(heap, reverse=True)
                ]
                for name, heap in query.items()
                for sign in [-1.0 if name.startswith("bottom") else 1.0]
            }
            for query in best
        ],
    }
    partial = f"{top_file(scores)}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(table) + "\n")
    os.replace(partial, top_file(scores))


def _push(heap: list[tuple[float, int, float]], item: tuple[float, int, float], size: int) -> None:
    if len(heap) < size:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)


def read_top(scores: str) -> dict[str, Any]:
    """Returns the table of `write_top`.

    Raises:
      RowFileError: the scores are not complete, or the table is damaged.
    """
    path = top_file(scores)
    if not os.path.isfile(scores):
        raise RowFileError(f"--scores={scores}: there is no such file.")
    if not os.path.isfile(path):
        raise RowFileError(
            f"--scores={scores} is not complete: run the same `launch.influence score` command again, and it continues."
        )
    try:
        with open(path, "rb") as file:
            table = json.loads(file.read(_MAX_BYTES))
        documents_, queries = table["documents"], table["queries"]
        if not isinstance(documents_, int) or not isinstance(queries, list):
            raise ValueError("it has no documents and queries")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RowFileError(
            f"{path} is damaged ({error}): delete it, and run `launch.influence score` again."
        ) from None
    rows = sum(1 for _ in read_scores(scores))
    if rows != documents_:
        raise RowFileError(
            f"--scores={scores} was cut short: it has {rows:,} of {documents_:,} rows. Run the same `launch.influence score` "
            "command again, and it writes the rest."
        )
    return table
