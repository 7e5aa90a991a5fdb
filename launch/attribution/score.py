"""Scores documents for queries: how much each document raises the log-probability of each completion.

Example, after `python -m launch.influence fit` wrote /tmp/factors:

  python -m launch.influence score --factors=/tmp/factors --queries=q.jsonl --documents=d.jsonl --out=/tmp/scores.jsonl

A query is {"prompt": "...", "completion": "..."}. Row i of the output has "scores", one for each query, and "norm", the norm of
the gradient of document i; a positive score means that the document makes the completion more probable. A stopped scan
continues when the same command runs again. The queries' gradients are in scores.jsonl.queries, and the top and bottom documents
of each query in scores.jsonl.top.json. --method=bm25 needs the extra `influence` (pip install 'espalier-lm[influence]').
"""

import argparse
import hashlib
import inspect
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from espalier.common.storage import paths
from launch import cli
from launch.attribution import factors as factor_files
from launch.attribution import inputs, outputs, ranking
from launch.attribution.fit import SAMPLE, add_document_flags, import_mixtures
from launch.config import setting_flags
from launch.inference import row_files
from launch.run import load_run
from launch.run.load_run import LoadError, RunConfig

Method = Literal[
    "ekfac", "kfac", "identity", "cosine", "ekfac_cg", "trak", "embedding", "bm25", "tfidf"
]
LEXICAL = ("bm25", "tfidf")
_GRADIENTS = (*factor_files.FITTED, "identity", "cosine", "trak")
# Settings that only some methods read.
_OF_METHODS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    _GRADIENTS: (
        *("modules", "rank", "query_dtype", "query_checkpoint"),
        *("per_layer", "token_scores"),
    ),
    (*factor_files.FITTED, "trak"): ("damping", "damping_kind"),
    factor_files.FITTED: ("precision",),
    ("ekfac_cg",): ("cg_steps", "cg_documents"),
    ("trak",): ("projection",),
}
_SETTINGS = ("method", "damping", "damping_kind", "rank", "query_dtype", "cg_steps", "cg_documents")
_SETTINGS += (
    "precision",
    "projection",
    "per_layer",
    "token_scores",
    "top",
    "length",
    "max_documents",
)
_SETTINGS += ("batch_size",)


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
    cli.take_addresses(parser, "factors", "query_checkpoint", "queries", "documents", "out")
    group = parser.add_argument_group("influence")
    group.add_argument("--factors", metavar="DIR", help="folder that `fit` wrote")
    group.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="run, step or Hugging Face directory; by default the one that the factors were fitted on",
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
    damping: float = 1e-4,
    damping_kind: Literal["relative", "absolute"] = "relative",
    rank: int = 64,
    query_dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16",
    cg_steps: int = 10,
    cg_documents: int = 16,
    precision: Literal["highest", "high", "default"] = "highest",
    projection: int = 32,
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
      checkpoint: step or run directory, or a Hugging Face directory.
      queries: JSON lines of queries.
      out: JSON lines of scores.
      factors: folder of fitted factors; None for methods without.
      params: see launch/run/load_run.py.
      query_checkpoint: model of the queries' gradients, if it is another.
      documents: JSON lines of documents.
      mixture: name of a SeqIO mixture in place of a file.
      split: split of the mixture.
      modules: names or patterns of layers; those of the factors if not set.
      method: ekfac, kfac, ekfac_cg (refined by conjugate gradients), identity (dot product of gradients), cosine, trak
        (random projections), embedding (cosine of mean hidden states), bm25 or tfidf.
      damping: factor on the mean eigenvalue of each matrix, or an absolute number; ekfac_cg adds the same numbers as ekfac.
      damping_kind: relative or absolute.
      rank: rank of the queries' gradients in memory; 0 for whole matrices in float32.
      query_dtype: dtype of the queries' low-rank factors; each column of int8 has a scale.
      cg_steps: steps of ekfac_cg.
      cg_documents: documents of its Gauss-Newton matrix, the first that factors were fitted on; at most 1,024.
      precision: of products in the eigenbasis and of Gauss-Newton products, on accelerators, as in `fit`.
      projection: side N of trak's projected gradients, which have N * N numbers.
      per_layer: whether rows have "layers", the scores of each matrix.
      token_scores: for so many documents at both ends of each query's ranking, writes the influence of each token to
        OUT.tokens.jsonl.
      top: number of top and bottom documents of each query in OUT.top.json.
      length: tokens that are read of each document; those of the factors if not set.
      max_documents: number of first documents that are scored; all if not set.
      batch_size: documents at a time.

    Raises:
      LoadError: settings or rows that do not fit, or scores of other settings in `out`.
    """
    from launch.attribution import scorers, similarity
    from trainers.checkpoints import agreement
    from trainers.influence import files

    row_files.check_output(out, "out", others={"queries": queries, "documents": documents})
    _check(
        *(method, factors),
        **{"rank": rank, "cg_steps": cg_steps, "cg_documents": cg_documents, "top": top},
        **{"projection": projection, "token_scores": token_scores},
    )
    _check_read(
        method,
        **{"modules": modules, "rank": rank, "query_dtype": query_dtype},
        **{"query_checkpoint": query_checkpoint, "per_layer": per_layer},
        **{"token_scores": token_scores, "damping": damping, "damping_kind": damping_kind},
        **{"cg_steps": cg_steps, "cg_documents": cg_documents, "projection": projection},
        precision=precision,
    )
    record = factor_files.read(factors) if factors else None
    if length is None and record is not None:
        length = int(record["length"])
    with (
        config.load(checkpoint, params=params, encoder_decoders=True) as run,
        outputs.opened(out, beside=True) as (path, push),
    ):
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
        made_of: dict[str, Any] = {
            "method": method,
            "queries": {"path": paths.absolute(queries), "sha256": _digest(queries)},
            "documents": source.record(),
            "length": size,
            "per_layer": per_layer,
        }
        if method in LEXICAL:
            scored: Any = similarity.Lexical(method, rows, source)
        elif method == "embedding":
            scored = similarity.Embeddings(
                *(run, rows, source),
                batch_size=run.batch_size(batch_size, 1 << 30),
                digest=files.model_digest(run.params),
            )
        else:
            made_of |= {
                **{"damping": damping, "damping_kind": damping_kind, "rank": rank},
                **{"query_dtype": query_dtype, "cg_steps": cg_steps if method == "ekfac_cg" else 0},
                **{"cg_documents": cg_documents if method == "ekfac_cg" else 0},
                **{"projection": projection if method == "trak" else 0},
                "precision": precision,
                "query_checkpoint": query_checkpoint and load_run.place(query_checkpoint),
            }
            scored = scorers.Gradients(
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
        count = _write(path, scored, made_of | scored.record, out=out, push=push)
        seconds = time.perf_counter() - began
        writer = agreement.is_primary()
        if writer:
            ranking.write_top(path, top=top)
            shown = {i for chosen in ranking.shown(ranking.read_top(path), top) for i in chosen}
            row_files.write(ranking.texts_file(path), source.texts(shown))
        if token_scores:
            agreement.gather("ranked")  # other processes read what the first has written
            rows_of_tokens = scored.token_rows(ranking.shown(ranking.read_top(path), token_scores))
            row_files.write(ranking.tokens_file(path), rows_of_tokens, writer=writer)
        push()
    if writer:
        for note in [*source.notes(), *scored.notes()]:
            print(note)
        print(f"{count:,} documents scored for {len(rows)} queries in {seconds:.1f} s: {out}")


def _check(method: str, factors: str | None, *, cg_steps: int, **numbers: int) -> None:
    if method in factor_files.FITTED and factors is None:
        raise LoadError(
            f"--method={method} needs --factors=DIR, which `launch.influence fit` writes."
        )
    least_values = {"rank": 0, "cg_documents": 1, "top": 1, "projection": 1, "token_scores": 0}
    for name, least in least_values.items():
        if numbers[name] < least:
            raise LoadError(f"--{name}={numbers[name]} must be at least {least}.")
    if numbers["cg_documents"] > SAMPLE:
        raise LoadError(
            f"--cg_documents={numbers['cg_documents']} must be at most {SAMPLE:,}, which `fit` stores."
        )
    if cg_steps < 0:
        raise LoadError(f"--cg_steps={cg_steps} must be at least 0.")


def _check_read(method: str, **settings: Any) -> None:
    """Raises LoadError if a setting has another value than its default, and nothing would read it."""
    parameters = inspect.signature(score).parameters
    changed = {n for n, value in settings.items() if value != parameters[n].default}
    for methods, names in _OF_METHODS.items():
        for name in names:
            if name in changed and method not in methods:
                raise LoadError(
                    f"--{name} is read by --method={' or '.join(methods)} alone, and this is {method}: remove it."
                )
    if settings["rank"] == 0 and "query_dtype" in changed:
        raise LoadError("--query_dtype is of low-rank factors, and --rank=0 has none: remove it.")


def _digest(path: str) -> str:
    with open(row_files.local(path, "queries"), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(
    path: str, scored: Any, record: Mapping[str, Any], *, out: str, push: Callable[[], None]
) -> int:
    """Writes the rows that a file does not have yet, and returns the number of all; see `outputs.opened`."""
    import jax

    from trainers.influence import files
    from trainers.influence.fit import SAVE_SECONDS

    folder = pathlib.Path(ranking.queries_folder(path))
    writer = jax.process_index() == 0
    record = json.loads(json.dumps(record))
    if files.exists(folder):
        _, other = files.read(folder)
        if names := sorted(name for name in record if other.get(name) != record[name]):
            raise LoadError(
                f"--out={out} has scores of other {', '.join(names)}: give another file, or delete it and "
                f"{ranking.queries_folder(out)}."
            )
    elif os.path.exists(path) and os.path.getsize(path):
        raise LoadError(
            f"--out={out} exists and is not of `launch.influence score`: give another file, or delete it."
        )
    scored.prepare(folder, record)
    push()
    pushed = time.monotonic()
    with row_files.resumed(path, writer=writer) as rows:
        count = len(rows.rows)
        for row in scored.stream(count):
            if writer:
                rows.add(row)
            count += 1
            if time.monotonic() - pushed > SAVE_SECONDS:
                push()
                pushed = time.monotonic()
    return count


if __name__ == "__main__":
    raise SystemExit(main())
