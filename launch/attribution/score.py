"""Scores documents for queries: how much each document raises the log-probability of each completion.

Example, after `python -m launch.influence fit` wrote /tmp/factors:

  python -m launch.influence score --factors=/tmp/factors --queries=q.jsonl --documents=d.jsonl --out=/tmp/scores.jsonl

A query is {"prompt": "...", "completion": "..."}. Row i of the output has "scores", one for each query, and "norm", the norm of
the gradient of document i; a positive score means that the document makes the completion more probable. A stopped scan
continues when the same command runs again. The queries' gradients are in scores.jsonl.queries, and the top and bottom documents
of each query in scores.jsonl.top.json. --method=bm25 needs the extra `influence` (pip install 'espalier-lm[influence]').
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from launch import cli
from launch.attribution import factors as factor_files
from launch.attribution import inputs, ranking
from launch.attribution.fit import add_document_flags, import_mixtures
from launch.config import setting_flags
from launch.inference import row_files
from launch.run import load_run
from launch.run.load_run import LoadedRun, LoadError, RunConfig

Method = Literal["ekfac", "kfac", "identity", "cosine", "ekfac_cg", "bm25", "tfidf"]
LEXICAL = ("bm25", "tfidf")
FITTED = ("ekfac", "kfac", "ekfac_cg")
_SETTINGS = ("method", "damping", "damping_kind", "rank", "query_dtype", "cg_steps", "cg_documents")
_SETTINGS += ("per_layer", "token_scores", "top", "length", "max_documents", "batch_size")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.main(
        __doc__,
        entry="launch.run.load_run:RunConfig",
        command="influence score",
        extra_flags=_add_flags,
        run=_run,
        default_files=_default_files,
        unused={"VOCABULARY": "None"},
        argv=argv,
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("influence")
    group.add_argument("--factors", metavar="DIR", help="folder that `fit` wrote")
    group.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="run or step directory; by default the one that the factors were fitted on",
    )
    group.add_argument("--params", choices=load_run.PARAMS, help="by default those of the factors")
    group.add_argument(
        "--query_checkpoint",
        metavar="DIR",
        help="model of the queries' gradients, such as a fine-tuned one, if it is another",
    )
    group.add_argument("--queries", required=True, metavar="FILE", help="JSON lines")
    group.add_argument("--out", required=True, metavar="FILE", help="JSON lines of scores")
    add_document_flags(group)
    group.add_argument(
        "--modules", metavar="NAMES", help="layers, as in `fit`; by default those of the factors"
    )
    setting_flags.add(group, score, names=_SETTINGS)


def _default_files(flags: argparse.Namespace) -> Sequence[str]:
    if flags.factors:
        record = factor_files.read(flags.factors)
        flags.checkpoint = flags.checkpoint or record["checkpoint"]
        flags.params = flags.params or str(record.get("params", "auto"))
    if not flags.checkpoint:
        raise LoadError("Give --factors=DIR, or --checkpoint=DIR for a method without factors.")
    flags.params = flags.params or "auto"
    return load_run.default_files(flags)


def _run(start: cli.Start) -> None:
    flags = start.flags
    import_mixtures(flags)
    names = ("factors", "checkpoint", "params", "query_checkpoint", "queries", "out", "documents")
    score(
        start(),
        **{name: getattr(flags, name) for name in (*names, "mixture", "split")},
        modules=flags.modules.split(",") if flags.modules else None,
        **setting_flags.given(flags, score, _SETTINGS),
    )


def score(
    config: RunConfig,
    *,
    checkpoint: str,
    queries: str,
    out: str,
    factors: str | None = None,
    params: str = "auto",
    query_checkpoint: str | None = None,
    documents: str | None = None,
    mixture: str | None = None,
    split: str = "train",
    modules: Sequence[str] | None = None,
    method: Method = "ekfac",
    damping: float = 0.1,
    damping_kind: Literal["relative", "absolute"] = "relative",
    rank: int = 64,
    query_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    cg_steps: int = 10,
    cg_documents: int = 16,
    per_layer: bool = False,
    token_scores: int = 0,
    top: int = 100,
    length: int | None = None,
    max_documents: int | None = None,
    batch_size: int = 8,
) -> None:
    """Writes the scores of documents to `out`, or continues there.

    Args:
      config: configuration of the checkpoint's run.
      checkpoint: step or run directory.
      queries: JSON lines of queries.
      out: JSON lines of scores.
      factors: folder of fitted factors; None for methods without.
      params: see launch/run/load_run.py.
      query_checkpoint: model of the queries' gradients, if it is another.
      documents: JSON lines of documents.
      mixture: name of a SeqIO mixture in place of a file.
      split: split of the mixture.
      modules: names or patterns of layers; those of the factors if not set.
      method: ekfac, kfac, ekfac_cg (refined by conjugate gradients), identity (dot product of gradients), cosine, bm25 or
        tfidf.
      damping: factor on the mean eigenvalue of each matrix, or an absolute number.
      damping_kind: relative or absolute.
      rank: rank of the queries' gradients in memory; 0 for whole matrices in float32.
      query_dtype: dtype of the queries' low-rank factors.
      cg_steps: steps of ekfac_cg.
      cg_documents: documents of its Gauss-Newton matrix, the first that factors were fitted on.
      per_layer: whether rows have "layers", the scores of each matrix.
      token_scores: for so many top documents of each query, writes the influence of each token to OUT.tokens.jsonl.
      top: number of top and bottom documents of each query in OUT.top.json.
      length: tokens that are read of each document; those of the factors if not set.
      max_documents: number of first documents that are scored; all if not set.
      batch_size: documents at a time.

    Raises:
      LoadError: settings or rows that do not fit, or scores of other settings in `out`.
    """
    import jax

    row_files.check_output(out, "out", others={"queries": queries, "documents": documents})
    _check(method, factors, rank=rank, cg_steps=cg_steps, cg_documents=cg_documents, top=top)
    record = factor_files.read(factors) if factors else None
    if length is None and record is not None:
        length = int(record["length"])
    with config.load(checkpoint, params=params, encoder_decoders=True) as run:
        size = inputs.length_of(run, length)
        rows = inputs.read_queries(run, queries, size)
        source = inputs.Documents(
            run=run,
            length=size,
            path=documents,
            mixture=mixture,
            split=split,
            limit=max_documents,
        )
        made_of = {
            "method": method,
            "queries": {"path": os.path.abspath(queries), "sha256": _digest(queries)},
            "documents": source.record(),
            "length": size,
            "per_layer": per_layer,
        }
        if method in LEXICAL:
            scored = _Lexical(method, rows, source)
        else:
            made_of |= {
                **{"damping": damping, "damping_kind": damping_kind, "rank": rank},
                **{"query_dtype": query_dtype, "cg_steps": cg_steps if method == "ekfac_cg" else 0},
                **{"cg_documents": cg_documents if method == "ekfac_cg" else 0},
                "query_checkpoint": query_checkpoint and factor_files.step_of(query_checkpoint),
            }
            scored = _Gradients(
                *(config, run, rows, source),
                checkpoint=checkpoint,
                factors=factors,
                record=record,
                modules=modules,
                settings=made_of,
                batch_size=run.batch_size(batch_size, 1 << 30),
                params=params,
            )
        began = time.perf_counter()
        count = _write(out, scored, source, made_of | scored.record, per_layer=per_layer)
        seconds = time.perf_counter() - began
        if jax.process_index() == 0:
            ranking.write_top(out, top=top)
        if token_scores and method not in LEXICAL:
            _write_tokens(out, scored, source, count=token_scores)
    if jax.process_index() == 0:
        for note in [*source.notes(), *scored.notes()]:
            print(note)
        print(f"{count:,} documents scored for {len(rows)} queries in {seconds:.1f} s: {out}")


def _check(method: str, factors: str | None, *, cg_steps: int, **numbers: int) -> None:
    if method in FITTED and factors is None:
        raise LoadError(
            f"--method={method} needs --factors=DIR, which `launch.influence fit` writes."
        )
    for name, least in (("rank", 0), ("cg_documents", 1), ("top", 1)):
        if numbers[name] < least:
            raise LoadError(f"--{name}={numbers[name]} must be at least {least}.")
    if cg_steps < 0:
        raise LoadError(f"--cg_steps={cg_steps} must be at least 0.")


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Lexical:
    """Scores by the tokens that a query shares with a document; all documents are read at once."""

    def __init__(self, method: str, rows: Sequence[Any], source: inputs.Documents):
        self.method, self.rows, self.source = method, rows, source
        self.record: dict[str, Any] = {}

    def prepare(self, folder: pathlib.Path, record: Mapping[str, Any]) -> None:
        import numpy as np

        from trainers.influence import queries

        empty = np.full(len(self.rows), np.nan)
        columns = dict.fromkeys(("nats", "norms", "kept", "pearson"), empty)
        queries.save(folder, queries.QuerySet(inputs={}, **columns), record)

    def stream(self, skip: int) -> Iterator[dict[str, Any]]:
        from trainers.influence import lexical

        texts = [[*row.context, *row.targets] for row in self.source]
        wanted = [[*row.encoder_inputs, *row.context, *row.targets] for row in self.rows]
        try:
            scores = (lexical.bm25 if self.method == "bm25" else lexical.tfidf)(wanted, texts)
        except ImportError:
            raise LoadError(
                "--method=bm25 needs bm25s: pip install 'espalier-lm[influence]'."
            ) from None
        return ({"scores": row.tolist()} for row in scores[skip:])

    def notes(self) -> list[str]:
        return []


class _Gradients:
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
        from trainers.influence import fit as stages
        from trainers.influence import kronecker, sites
        from trainers.influence.files import model_digest

        self.config, self.run, self.rows, self.source = config, run, rows, source
        self.settings, self.factors, self.params = settings, factors, params
        digest = model_digest(run.params)
        if record is not None and factors is not None:
            factor_files.check_model(factors, record, digest, checkpoint)
        fitted = record["settings"]["modules"] if record is not None else ["mlp"]
        self.sites = sites.select(run.model, run.params, tuple(modules or fitted))
        lacking = sorted(set(self.sites) - set(record["sites"])) if record is not None else []
        if lacking and settings["method"] in FITTED:
            raise LoadError(
                f"--modules chooses {lacking[0]}, which --factors={factors} lack: they have {', '.join(fitted)}."
            )
        # Raises before any work.
        self.damping = kronecker.Damping(settings["damping"], settings["damping_kind"])
        self.reader = stages.Reader(
            model=run.model, params=run.params, batch_size=batch_size, sharding=run.row_sharding
        )
        self.record = {"model": digest, "sites": sorted(self.sites), "factors": factors and record}
        self.queries: Any = None

    def prepare(self, folder: pathlib.Path, record: Mapping[str, Any]) -> None:
        """Computes the queries' gradients, or reads those of an earlier start."""
        from trainers.influence import files, queries

        if files.exists(folder):
            self.queries, _ = queries.load(folder)
            return
        sample = inputs.read_sample(pathlib.Path(self.factors or "") / factor_files.SAMPLE)
        with self._query_reader() as reader:
            precondition, refine = self._curvature(reader, sample)
            self.queries = queries.prepare(
                *(reader, self.sites, self.rows, precondition),
                rank=self.settings["rank"] or None,
                store_dtype=self.settings["query_dtype"],
                sample=sample if self.settings["query_checkpoint"] is None else (),
                refine=refine,
            )
        queries.save(folder, self.queries, record)

    @contextlib.contextmanager
    def _query_reader(self) -> Iterator[Any]:
        """The reader of the queries' model."""
        import dataclasses

        from launch.run import run_model

        other = self.settings["query_checkpoint"]
        if other is None:
            yield self.reader
            return
        config = dataclasses.replace(
            self.config, model=run_model.model(run=other, macro="query_checkpoint")
        )
        with config.load(other, params=self.params, encoder_decoders=True) as run:
            yield dataclasses.replace(self.reader, model=run.model, params=run.params)

    def _curvature(self, reader: Any, sample: Sequence[Any]) -> tuple[Any, Any]:
        """Returns what preconditions a batch of gradients, and what refines the gradients of one query."""
        from trainers.influence import conjugate, documents
        from trainers.influence import fit as stages

        method = self.settings["method"]
        if method not in FITTED:
            return None, None
        strategy = "kfac" if method == "kfac" else "ekfac"
        curvature = stages.read_curvature(
            pathlib.Path(self.factors or ""), self.sites, strategy, self.damping
        )
        if method != "ekfac_cg":
            return curvature, None
        batch = [row for row in sample if row.targets][: self.settings["cg_documents"]]
        if not batch:
            raise LoadError(
                f"--factors={self.factors} have no documents for ekfac_cg: fit them again."
            )
        longest = max(row.inputs for row in batch)
        length = documents.bucket_length(longest, limit=self.run.model.max_length)
        size = self.run.batch_size(len(batch), len(batch))
        arrays = self.reader.place(documents.columns(batch, range(len(batch)), size, length))
        product = conjugate.gauss_newton(self.run.model, self.sites)

        def refine(q: Any) -> tuple[Any, Any]:
            solution = conjugate.solve(
                lambda v: product(self.run.params, arrays, v),
                curvature,
                q,
                steps=self.settings["cg_steps"],
            )
            return solution.x, solution.note

        return None, refine

    def stream(self, skip: int) -> Iterator[dict[str, Any]]:
        from trainers.influence import scores

        scored = scores.score(
            *(self.reader, self.sites, self.queries),
            itertools.islice(iter(self.source), skip, None),
            first=skip,
            per_layer=self.settings["per_layer"],
            cosine=self.settings["method"] == "cosine",
            total=self.source.count(),
        )
        for one in scored:
            row: dict[str, Any] = {"scores": one.scores.tolist(), "norm": one.norm}
            if one.layers is not None:
                row["layers"] = {path: values.tolist() for path, values in one.layers.items()}
            yield row

    def notes(self) -> list[str]:
        import numpy as np

        kept, pearson = self.queries.kept, self.queries.pearson
        text = f"query gradients keep {100 * np.mean(kept):.2f} % of their squared norm (least {100 * np.min(kept):.2f} %)"
        if not np.all(np.isnan(pearson)):
            text += f"; scores of sample documents correlate at {np.nanmean(pearson):.4f} with uncompressed ones (least "
            text += f"{np.nanmin(pearson):.4f})"
        return [text]


def _write(
    out: str, scored: Any, source: inputs.Documents, record: Mapping[str, Any], *, per_layer: bool
) -> int:
    """Writes the rows that `out` does not have yet, and returns the number of all."""
    import jax

    from trainers.influence import files

    folder = pathlib.Path(ranking.queries_folder(out))
    writer = jax.process_index() == 0
    record = json.loads(json.dumps(record))
    if files.exists(folder):
        _, other = files.read(folder)
        if names := sorted(name for name in record if other.get(name) != record[name]):
            raise LoadError(
                f"--out={out} has scores of other {', '.join(names)}: give another file, or delete it and {folder}."
            )
    elif os.path.exists(out) and os.path.getsize(out):
        raise LoadError(
            f"--out={out} exists and is not of `launch.influence score`: give another file, or delete it."
        )
    scored.prepare(folder, record)
    with row_files.resumed(out, writer=writer) as rows:
        count = len(rows.rows)
        for row in scored.stream(count):
            if writer:
                rows.add(row)
            count += 1
    return count


def _write_tokens(out: str, scored: Any, source: inputs.Documents, *, count: int) -> None:
    """Writes the influence of the tokens of each query's top documents."""
    import jax
    import numpy as np

    from trainers.influence import documents, queries, token_scores

    tops = ranking.read_top(out)["queries"]
    wanted = [[entry["document"] for entry in query["top"][:count]] for query in tops]
    needed = {index for chosen in wanted for index in chosen}
    rows = {i: row for i, row in enumerate(source) if i in needed}
    influence = token_scores.output_token_scores(scored.run.model, scored.sites)
    size = scored.run.batch_size(1, 1)

    def lines() -> Iterator[dict[str, Any]]:
        for q, chosen in enumerate(wanted):
            direction = {
                path: np.take(
                    np.asarray(queries.whole(scored.queries.inputs[path], "float32")),
                    *(q, len(site.scan)),
                )
                for path, site in scored.sites.items()
            }
            for index in chosen:
                row = rows[index]
                if not row.targets:
                    continue
                length = documents.bucket_length(row.inputs, limit=scored.run.model.max_length)
                arrays = scored.reader.place(documents.columns([row], [index], size, length))
                values = jax.device_get(influence(scored.run.params, arrays, direction))[0]
                first = len(row.context) - 1
                own = values[first : first + len(row.targets)]
                yield {
                    "query": q,
                    "document": index,
                    "tokens": [*row.targets],
                    "scores": own.tolist(),
                    "concentration": token_scores.concentration(own),
                    "spurious": token_scores.is_spurious(own),
                }

    row_files.write(f"{out}.tokens.jsonl", lines(), writer=jax.process_index() == 0)


if __name__ == "__main__":
    raise SystemExit(main())
