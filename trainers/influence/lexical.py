"""Lexical baselines on token ids: BM25 and TF-IDF. Both rank documents by the tokens that they share with a query."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

K1, B = 1.5, 0.75


def bm25(queries: Sequence[Sequence[int]], documents: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns BM25 scores [documents, queries] with k1 = 1.5, b = 0.75 and Lucene's IDF, log(1 + (N - n + 0.5) / (n + 0.5)).

    A token that a query has several times counts once for each.
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # the package makes it DEBUG
    if not any(map(len, documents)):
        return np.zeros((len(documents), len(queries)))
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index([[*map(str, text)] for text in documents], show_progress=False)
    known = {token for text in documents for token in text}
    columns = []
    for query in queries:
        tokens = [str(token) for token in query if token in known]
        empty = np.zeros(len(documents))
        columns.append(np.asarray(index.get_scores(tokens)) if tokens else empty)
    return np.stack(columns, axis=1).astype(np.float64)


def tfidf(queries: Sequence[Sequence[int]], documents: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns TF-IDF scores [documents, queries]: the sum over a query's distinct tokens of (k1 + 1) e / (k1 + e) IDF.

    e is 1 if the document has the token, else 0, so that each shared token adds its IDF, log(N / n) (Grosse et al., arXiv
    2308.03296).
    """
    counts: Counter[Any] = Counter(token for text in documents for token in set(text))
    idf = {token: math.log(len(documents) / n) for token, n in counts.items()}
    scores = np.zeros((len(documents), len(queries)))
    wanted = [set(query) for query in queries]
    for d, text in enumerate(documents):
        present = set(text)
        for q, query in enumerate(wanted):
            scores[d, q] = sum(idf[token] for token in query & present)
    return scores
