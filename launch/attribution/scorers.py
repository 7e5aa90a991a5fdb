"""The scorer of the command `influence score` by gradients.

A scorer prepares the queries once, then yields the rows of all documents from any row on.
"""

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.attribution import factors as factor_files
from launch.attribution import inputs
from launch.run import run_model
from launch.run.load_run import LoadedRun, LoadError, RunConfig
from trainers.influence import conjugate, documents, files, kronecker, projections, queries, scores
from trainers.influence import fit as stages
from trainers.influence import sites as site_list
from trainers.influence.token_scores import concentration, is_spurious, output_token_scores

_COMPARED = 64  # sample documents over which compressed and whole gradients are compared


class Gradients:
    """Scores by gradients: the queries' are prepared, then documents stream once."""

    def __init__(
        self,
        config: RunConfig,
        run: LoadedRun,
        rows: Sequence[Any],
        source: inputs.Documents,
        *,
        checkpoint: str,
        factors: str | None,
        record: Mapping[str, Any] | None,
        modules: Sequence[str] | None,
        settings: Mapping[str, Any],
        batch_size: int,
        params: str,
    ):
        self.config, self.run, self.rows, self.source = config, run, rows, source
        self.settings, self.factors, self.params = settings, factors, params
        digest = files.model_digest(run.params)
        if record is not None and factors is not None:
            factor_files.check_model(factors, record, digest, checkpoint)
        fitted = record["settings"]["modules"] if record is not None else ["mlp"]
        self.sites = site_list.select(run.model, run.params, tuple(modules or fitted))
        lacking = sorted(set(self.sites) - set(record["sites"])) if record is not None else []
        if lacking and settings["method"] in factor_files.FITTED:
            raise LoadError(
                f"--modules chooses {lacking[0]}, which --factors={factors} lack: they have {', '.join(fitted)}."
            )
        self.dtype = "float32"
        if record is not None and record["settings"]["factor_dtype"] == "float64":
            self.dtype = "float64"
            factor_files.check_float64(self.dtype)
        # Raises before any work.
        self.damping = kronecker.Damping(settings["damping"], settings["damping_kind"])
        self.reader = stages.Reader(
            model=run.model, params=run.params, batch_size=batch_size, sharding=run.row_sharding
        )
        self.record = {"model": digest, "sites": sorted(self.sites), "factors": factors and record}
        self.queries: Any = None

    def prepare(self, folder: pathlib.Path, record: Mapping[str, Any]) -> None:
        """Computes the queries' gradients, or reads those of an earlier start."""
        if files.exists(folder):
            self.queries, _ = queries.load(folder)
            return
        sample = inputs.read_sample(factor_files.local(self.factors or "") / factor_files.SAMPLE)
        with self._query_reader() as reader:
            precondition, refine = self._curvature(reader, sample)
            self.queries = queries.prepare(
                *(reader, self.sites, self.rows, precondition),
                rank=self.settings["rank"] or None,
                store_dtype=self.settings["query_dtype"],
                dtype=self.dtype,
                sample=sample[:_COMPARED],
                of_sample=self.reader,
                refine=refine,
            )
        queries.save(folder, self.queries, record)

    @contextlib.contextmanager
    def _query_reader(self) -> Iterator[Any]:
        """The reader of the queries' model."""
        other = self.settings["query_checkpoint"]
        if other is None:
            yield self.reader
            return
        config = dataclasses.replace(
            self.config, model=run_model.of_checkpoint(other, macro="query_checkpoint")
        )
        with config.load(other, params=self.params, encoder_decoders=True) as run:
            sites, _ = site_list.discover(run.model, run.params)
            for path, site in self.sites.items():
                if sites.get(path) != site:
                    raise LoadError(
                        f"--query_checkpoint={other} has no matrix {path} like that of the documents' model: give a fine-tuned "
                        "form of the same model. If one of the two is a Hugging Face directory, whose layers are not stacked, "
                        "import it with launch.convert."
                    )
            yield dataclasses.replace(self.reader, model=run.model, params=run.params)

    def _curvature(self, reader: Any, sample: Sequence[Any]) -> tuple[Any, Any]:
        """Returns what preconditions a batch of gradients, and what refines the gradients of one query."""
        method = self.settings["method"]
        if method == "trak":
            return self._projected(), None
        if method not in factor_files.FITTED:
            return None, None
        strategy = "kfac" if method == "kfac" else "ekfac"
        curvature = stages.read_curvature(
            *(factor_files.local(self.factors or ""), self.sites, strategy, self.damping),
            reader=reader,
            precision=self.settings["precision"],
        )
        if method != "ekfac_cg":
            return curvature, None
        rows = [row for row in sample if row.targets][: self.settings["cg_documents"]]
        if not rows:
            raise LoadError(
                f"--factors={self.factors} have no documents for ekfac_cg: fit them again."
            )
        product = conjugate.over(
            conjugate.gauss_newton(self.run.model, self.sites, self.settings["precision"]),
            self.run.params,
            [
                (len(indices), self.reader.place(arrays))
                for indices, arrays in self.reader.batches(rows, 0)
            ],
        )

        def refine(q: Any) -> tuple[Any, Any]:
            steps = self.settings["cg_steps"]
            solution = conjugate.solve(product, curvature, q, steps=steps)
            return solution.x, {**solution.note, "documents": len(rows)}

        return None, refine

    def _projected(self) -> projections.ProjectedCurvature:
        """Returns the inverse of the second moment of all documents' projected gradients, from a pass of its own."""
        own = projections.projections(self.sites, self.settings["projection"])
        moment = projections.second_moment(
            *(self.reader, self.sites, own, self.source),
            total=self.source.count(),
            dtype=self.dtype,
        )
        return projections.ProjectedCurvature.of(self.sites, own, moment, self.damping)

    def stream(self, skip: int) -> Iterator[dict[str, Any]]:
        scored = scores.score(
            *(self.reader, self.sites, self.queries),
            itertools.islice(iter(self.source), skip, None),
            first=skip,
            per_layer=self.settings["per_layer"],
            cosine=self.settings["method"] == "cosine",
            total=self.source.count(),
            dtype=self.dtype,
        )
        for one in scored:
            row: dict[str, Any] = {"scores": one.scores.tolist(), "norm": one.norm}
            if one.layers is not None:
                row["layers"] = {path: values.tolist() for path, values in one.layers.items()}
            yield row

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
        rows = {i: row for i, row in enumerate(self.source) if i in needed}
        norms = self._norms(rows) if self.settings["method"] == "cosine" else None
        influence = output_token_scores(self.run.model, self.sites)
        size = self.run.batch_size(1, 1)
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
                length = documents.bucket_length(row.inputs, limit=self.run.model.max_length)
                arrays = self.reader.place(documents.columns([row], [index], size, length))
                values = np.asarray(influence(self.run.params, arrays, direction))[0]
                first = len(row.context) - 1
                own = values[first : first + len(row.targets)]
                if norms is not None:  # a cosine's tokens add up to the cosine
                    own = own / max(self.queries.norms[q] * norms[index], scores.LEAST_NORMS)
                yield {
                    "query": q,
                    "document": index,
                    "tokens": [*row.targets],
                    "texts": inputs.texts(self.run, row),
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
