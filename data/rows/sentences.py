"""Embeddings of the sentences of rows, which another model computed: lists of numbers under "sentence_embedding".

{"inputs": "...", "targets": "...", "sentence_embedding": [0.12, -0.4, ...]}
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.data.stream.rows import SENTENCE, SENTENCES
from espalier.data.text.documents import DataError


def of_row(row: Mapping[str, Any], where: str) -> np.ndarray:
    """Returns the embedding of a row, float32 [width].

    Raises:
      DataError: there is none, or it is no list of finite numbers.
    """
    values = row.get(SENTENCE)
    if isinstance(values, np.ndarray):  # of Parquet and Arrow
        values = values.tolist()
    numbers = isinstance(values, list) and all(type(x) in (int, float) for x in values)
    if not numbers or not values or not all(map(math.isfinite, values)):
        raise DataError(
            f"{where}: {SENTENCE!r} is no list of numbers; espalier prepare embed_sentences writes one for each row"
        )
    return np.array(values, np.float32)


def columns(row: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """Returns the column of a row's embedding; none if the row has no embedding. Raises DataError for a malformed one."""
    return {SENTENCES: of_row(row, where)} if SENTENCE in row else {}


def features(used: bool) -> dict[str, tuple[tuple[int | None, ...], str]]:
    """Returns the feature of embeddings, for the features of a source; none unless they are used."""
    return {SENTENCE: ((None,), "float32")} if used else {}
