"""The scorers of the command `influence score`: by gradients, by shared tokens, and by similar hidden states.

A scorer prepares the queries once, then yields the rows of all documents from any row on.

Shapes: N documents, Q queries, D width.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.bars import Bar
from espalier.launch.influence import inputs, outputs
from espalier.launch.load.load_run import LoadedRun, LoadError
from espalier.model import layer_groups
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.influence import documents, files, queries, scores
from espalier.trainers.influence import fit as stages
from espalier.trainers.influence import sites as site_list
from espalier.trainers.influence.scores import concentration, is_spurious, output_token_scores
from espalier.trainers.scoring.scoring import MeanStates, Row

_COMPARED = 64  # sample documents over which compressed and whole gradients are compared


class Gradients:
    """Scores by gradients: the queries' are prepared, then documents stream once.

    Args:
      method, scan: a `Gradients` and a `Scan` of launch/influence/methods.py, which makes this.
    """

    def __init__(self, method: Any, scan: Any):
        self.method, self.scan, self.source = method, scan, scan.source
        run, fitted = scan.run, scan.fitted
        digest = files.model_digest(run.params)
        if fitted is not None and scan.factors is not None:
            outputs.check_model(scan.factors, fitted, digest, scan.checkpoint)
        names = fitted["settings"]["modules"] if fitted is not None else ["mlp"]
        self.sites = site_list.select(run.model, run.params, tuple(method.modules or names))
        lacking = sorted(set(self.sites) - set(fitted["sites"])) if fitted is not None else []
        if lacking and method.needs_factors:
            raise LoadError(
                f"--modules chooses {lacking[0]}, which --factors={scan.factors} lack: they have {', '.join(names)}."
            )
        self.dtype = "float32"
        if fitted is not None and fitted["settings"]["factor_dtype"] == "float64":
            self.dtype = "float64"
            outputs.check_float64(self.dtype)
        self.reader = stages.Reader(
            model=run.model,
            params=run.params,
            batch_size=scan.batch_size,
            sharding=run.row_sharding,
        )
        self.record = {
            **{"model": digest, "sites": sorted(self.sites)},
            "factors": scan.factors and fitted,
        }
        self.queries: Any = None

    def prepare(self, folder: pathlib.Path, record: Mapping[str, Any]) -> None:
        """Computes the queries' gradients, or reads those of an earlier start."""
        if files.exists(folder):
            self.queries, _ = queries.load(folder)
            return
        with self._query_reader() as reader:
            self.queries = queries.prepare(
                *(reader, self.sites, self.scan.rows),
                **self.method.preconditioned(self, reader),
                rank=self.method.rank or None,
                store_dtype=self.method.query_dtype,
                dtype=self.dtype,
                sample=self.scan.sample()[:_COMPARED],
                of_sample=self.reader,
            )
        queries.save(folder, self.queries, record)

    @contextlib.contextmanager
    def _query_reader(self) -> Iterator[Any]:
        """The reader of the queries' model."""
        other, scan = self.method.query_checkpoint, self.scan
        with inputs.query_run(scan.config, scan.run, other, params=scan.params) as run:
            if run is scan.run:
                yield self.reader
                return
            sites, _ = site_list.discover(run.model, run.params)
            for path, site in self.sites.items():
                if sites.get(path) != site:
                    raise LoadError(
                        f"--query_checkpoint={other} has no matrix {path} like that of the documents' model: give a fine-tuned "
                        "form of the same model. If one of the two is a Hugging Face directory, whose layers are not stacked, "
                        "import it with espalier convert."
                    )
            yield dataclasses.replace(self.reader, model=run.model, params=run.params)

    def stream(self, skip: int) -> Iterator[dict[str, Any]]:
        scored = scores.score(
            *(self.reader, self.sites, self.queries),
            itertools.islice(iter(self.source), skip, None),
            first=skip,
            per_layer=self.method.per_layer,
            cosine=self.method.normalised,
            total=self.source.count(),
            dtype=self.dtype,
        )
        for one in scored:
            row: dict[str, Any] = {"scores": one.scores.tolist()}
            if not self.method.normalised:  # else the scores are divided by it already
                row["norm"] = one.norm
            if one.layers is not None:
                row["layers"] = self._by_layer(one.layers)
            yield row

    @functools.cached_property
    def _stacks(self) -> dict[str, tuple[layer_groups.Group, ...]]:
        """The groups of the model's scanned layers, by stack."""
        shapes = {name: x.shape for name, x in state_tree.flatten(self.reader.params).items()}
        return layer_groups.in_stacks(shapes, scanned=True)

    def _by_layer(self, scores: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
        """Returns scores [Q] by matrix of one layer, named as in unrolled models, from [L, Q] of scanned blocks."""
        by_layer = {}
        for path, values in scores.items():
            match = layer_groups.BLOCK.fullmatch(path)
            if match is None or values.ndim == 1:
                by_layer[path] = values.tolist()
                continue
            layers = layer_groups.layers_of(self._stacks[match[1]], int(match[2]))
            for layer, own in zip(layers, values, strict=True):
                by_layer[f"{match[1]}/block_{layer}/{match[3]}"] = own.tolist()
        return by_layer

    def notes(self) -> list[str]:
        kept, pearson = self.queries.kept, self.queries.pearson
        text = f"query gradients keep {100 * np.mean(kept):.2f} % of their squared norm (least {100 * np.min(kept):.2f} %)"
        if not np.all(np.isnan(pearson)):
            text += f"; scores of sample documents correlate at {np.nanmean(pearson):.4f} with uncompressed ones (least "
            text += f"{np.nanmin(pearson):.4f})"
        notes = [text]
        if refined := self.queries.notes:
            left = [note["residuals"][-1] for note in refined if note["residuals"]]
            text = f"conjugate gradients on {refined[0]['documents']:,} documents"
            notes.append(f"{text}, relative residuals up to {max(left):.2g}" if left else text)
        return notes

    def token_rows(self, wanted: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
        """Yields the influence of every token of some documents, and its text, in the order of the queries.

        Args:
          wanted: indices of documents, by query.
        """
        needed = {index for chosen in wanted for index in chosen}
        rows = dict(self.source.chosen(needed))
        norms = self._norms(rows) if self.method.normalised else None
        influence = output_token_scores(self.scan.run.model, self.sites)
        size = self.scan.run.batch_size(1, 1)
        for q, chosen in enumerate(wanted):
            direction = {
                path: queries.whole(
                    {
                        name: np.take(x, q, axis=len(site.scan))
                        for name, x in self.queries.inputs[path].items()
                    },
                    "float32",
                )
                for path, site in self.sites.items()
            }
            for index in chosen:
                row = rows[index]
                if not row.targets:
                    continue
                length = documents.bucket_length(row.inputs, limit=self.scan.run.model.max_length)
                arrays = self.reader.place(documents.columns([row], [index], size, length))
                values = np.asarray(influence(self.scan.run.params, arrays, direction))[0]
                first = len(row.context) - 1
                own = values[first : first + len(row.targets)]
                if norms is not None:  # a cosine's tokens add up to the cosine
                    own = own / max(self.queries.norms[q] * norms[index], scores.LEAST_NORMS)
                yield {
                    "query": q,
                    "document": index,
                    "tokens": [*row.targets],
                    "texts": inputs.texts(self.scan.run, row),
                    "scores": own.tolist(),
                    "concentration": concentration(own),
                    "spurious": is_spurious(own),
                }

    def _norms(self, rows: Mapping[int, Any]) -> dict[int, float]:
        """Returns the norms of the gradients of some documents."""
        scored = scores.score(
            self.reader, self.sites, self.queries, rows.values(), dtype=self.dtype
        )
        return {index: one.norm for index, one in zip(rows, scored, strict=True)}


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
            raise LoadError("--method=bm25 needs bm25s: pip install -e '.[influence]'.") from None
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
