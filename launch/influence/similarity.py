"""Scorers of the command `influence score` that need no gradients: shared tokens, and similar hidden states.

Shapes: N documents, Q queries, D width.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.bars import Bar
from espalier.launch.influence import inputs
from espalier.launch.run.load_run import LoadedRun, LoadError
from espalier.trainers.influence import documents, files, queries
from espalier.trainers.scoring.scoring import MeanStates, Row


def _save(folder: pathlib.Path, own: Any, count: int, record: Mapping[str, Any]) -> None:
    """Writes what is known of queries without gradients."""
    columns = dict.fromkeys(("nats", "norms", "kept", "pearson"), np.full(count, np.nan))
    queries.save(folder, queries.QuerySet(inputs=own, **columns), record)


class Lexical:
    """Scores by the tokens that a query shares with a document; all documents are read at once."""

    def __init__(self, score: Callable[..., Any], rows: Sequence[Row], source: Iterable[Row]):
        self.score, self.rows, self.source = score, rows, source
        self.record: dict[str, Any] = {}

    def prepare(self, folder: pathlib.Path, record: Mapping[str, Any]) -> None:
        _save(folder, {}, len(self.rows), record)

    def stream(self, skip: int) -> Iterator[dict[str, Any]]:
        texts, wanted = (
            [[*row.encoder_inputs, *row.context, *row.targets] for row in rows]
            for rows in (self.source, self.rows)
        )
        try:
            scores = self.score(wanted, texts)
        except ImportError:
            raise LoadError(
                "--method=bm25 needs bm25s: pip install 'espalier-lm[influence]'."
            ) from None
        return ({"scores": row.tolist()} for row in scores[skip:])

    def notes(self) -> list[str]:
        return []


class Embeddings:
    """Scores by the cosine of the mean final hidden states of a query and a document.

    The first token is in no mean: it starts the text, and its state depends on nothing else.
    """

    def __init__(
        self,
        run: LoadedRun,
        rows: Sequence[Row],
        source: inputs.Documents,
        *,
        batch_size: int,
    ):
        if run.encodes:
            raise LoadError(
                "--method=embedding reads decoder-only models: choose another method for this encoder-decoder."
            )
        self.rows, self.source, self.batch_size = rows, source, batch_size
        self.record = {"model": files.model_digest(run.params)}
        self._limit = run.model.max_length
        self._means = MeanStates(
            run.model, run.params, batch_size=batch_size, sharding=run.row_sharding
        )
        self._queries_QD = np.zeros((0, 0))

    def prepare(self, folder: pathlib.Path, record: Mapping[str, Any]) -> None:
        """Computes the queries' states, or reads those of an earlier start."""
        if files.exists(folder):
            self._queries_QD = queries.load(folder)[0].inputs["states"]["mean"]
            return
        self._queries_QD = self._states(self.rows)
        own = {"states": {"mean": self._queries_QD}}
        _save(folder, own, len(self.rows), record)

    def stream(self, skip: int) -> Iterator[dict[str, Any]]:
        source = itertools.islice(iter(self.source), skip, None)
        total = self.source.count()
        with Bar(desc="scores", unit="document", total=total, initial=skip) as progress:
            for window in documents.windows(source, self.batch_size):
                scores_NQ = cosines(self._states(window), self._queries_QD)
                yield from ({"scores": row.tolist()} for row in scores_NQ)
                progress.update(len(window))

    def _states(self, rows: Sequence[Row]) -> np.ndarray:
        return mean_states(self._means, rows, limit=self._limit)

    def notes(self) -> list[str]:
        return []


def embeddings(
    means: MeanStates, rows: Sequence[Row], wanted: Sequence[Row], *, limit: int | None
) -> np.ndarray:
    """Returns the scores [N, Q] of `Embeddings` for documents and queries that are in memory."""
    states = (mean_states(means, own, limit=limit) for own in (rows, wanted))
    return cosines(*states)


def mean_states(means: MeanStates, rows: Sequence[Row], *, limit: int | None) -> np.ndarray:
    """Returns the mean states [N, D] of texts of at most `limit` tokens; of a text without a second token zeros."""
    texts = [[*row.context, *row.targets][:limit] for row in rows]
    read = [Row(context=text[:1], targets=text[1:]) for text in texts]
    return np.stack(list(means.stream(read, title=None)))


def cosines(states_ND: np.ndarray, queries_QD: np.ndarray) -> np.ndarray:
    """Returns the cosines [N, Q] of states; 0 with a state of zeros."""
    units = []
    for x in (np.asarray(states_ND, np.float64), np.asarray(queries_QD, np.float64)):
        norms = np.linalg.norm(x, axis=-1, keepdims=True)
        units.append(x / np.where(norms > 0, norms, 1))
    return units[0] @ units[1].T
