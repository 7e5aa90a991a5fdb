"""Scores documents for queries: how much each document raises the log-probability of each completion.

Example, after `espalier influence fit` wrote /tmp/factors:

  espalier influence score --factors=/tmp/factors --queries=q.jsonl --documents=d.jsonl --out=/tmp/scores.jsonl

A query is {"prompt": "...", "completion": "..."}. Row i of the output has "scores", one for each query, and "norm", the norm of
the gradient of document i; a positive score means that the document makes the completion more probable. A stopped scan
continues when the same command runs again. The queries' gradients are in scores.jsonl.queries, and the top and bottom documents
of each query in scores.jsonl.top.json. With --beam_pipeline_options the workers of an Apache Beam pipeline score the documents, in
shards beside the output, which stay when it is stopped; the scores are the same. --method=bm25 needs the extra `influence` (pip
install -e '.[influence]').
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from espalier.common import pipelines
from espalier.common.ranges import Size
from espalier.common.storage import paths
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.config.setting_flags import File, Folder
from espalier.launch.inference import row_files, shards
from espalier.launch.influence import checkpoints, inputs, methods, outputs
from espalier.launch.influence.checkpoints import Several
from espalier.launch.load import load_run
from espalier.launch.load.load_run import LoadError, RunConfig

_FILES = ("factors", "queries", "out")
_SIZES = ("completion_tokens", "top", "length", "batch_size")
TOP = 100
_NOT_COUNTED = [
    "documents that were cut, or that repeat an earlier one, are not counted by a pipeline"
]


def _add_flags(parser: argparse.ArgumentParser) -> None:
    cli.take_addresses(parser, "factors", "query_checkpoint", "queries", "documents", "out")
    group = parser.add_argument_group("influence")
    setting_flags.add(group, score, names=_FILES)
    group.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="run, step or Hugging Face directory of the model (default: the checkpoint that the factors were fitted on)",
    )
    group.add_argument(
        "--params",
        choices=load_run.PARAMS,
        help="which parameters are used (default: the kind that the factors were fitted on)",
    )
    setting_flags.add(group, Several)
    setting_flags.add(group, inputs.Source)
    methods.add_flags(group)
    setting_flags.add(group, score, names=_SIZES)
    pipelines.add_flag(parser)


def _default_files(flags: argparse.Namespace) -> Sequence[str]:
    factors, several = (
        getattr(flags, "factors", None),
        Several(**setting_flags.given(flags, Several)),
    )
    if several.checkpoints is not None:
        flags.checkpoint = checkpoints.first(several, flags.checkpoint)
        factors = several.folders(factors)[0] if factors else None
    if factors:
        record = outputs.read(factors)
        flags.checkpoint = flags.checkpoint or record["checkpoint"]
        flags.params = flags.params or str(record.get("params", "auto"))
    if not flags.checkpoint:
        raise LoadError("Give --factors=DIR, or --checkpoint=DIR for a method without factors.")
    flags.params = flags.params or "auto"
    return load_run.default_files(flags)


def _run(start: cli.Start) -> None:
    flags = start.flags
    source = inputs.Source(**setting_flags.given(flags, inputs.Source))
    source.import_mixtures()
    several = Several(**setting_flags.given(flags, Several))
    if several.checkpoints is not None:
        if flags.beam_pipeline_options:
            raise LoadError(
                "--beam_pipeline_options scores by one checkpoint: give each as --checkpoint, or remove it."
            )
        if getattr(flags, "completion_tokens", None) is not None:
            raise LoadError(
                "--completion_tokens with --checkpoints: each checkpoint would write other completions. Score by one first, "
                "and give its OUT.completions.jsonl as --queries."
            )
        row_files.check_output(flags.out, "out", others={"queries": flags.queries})
        own = {"params": flags.params, "source": source, "method": methods.of_flags(flags)}
        given = {"top": TOP, **setting_flags.given(flags, score, ("queries", *_SIZES))}
        scored = functools.partial(score, start(), **own, **given)
        checkpoints.score_each(
            scored, several, getattr(flags, "factors", None), flags.out, top=given["top"]
        )
        return
    pipeline = shards.pipeline(start, "espalier.launch.influence.score:scorer_of")
    score(
        start(),
        checkpoint=pipeline.checkpoint if pipeline else flags.checkpoint,  # as its workers
        params=flags.params,
        source=source,
        method=methods.of_flags(flags),
        pipeline=pipeline,
        **setting_flags.given(flags, score, (*_FILES, *_SIZES)),
    )


@contextlib.contextmanager
def scorer_of(words: Sequence[str], all_shards: shards.Shards) -> Iterator[shards.Scorer]:
    """Context manager: yields what scores a shard, with the model and the queries that are read once; see `shards.Work`."""
    del all_shards
    start = load_run.start_of(words, _add_flags, files=_default_files)
    flags = start.flags
    given = setting_flags.given(flags, _scan)
    source = inputs.Source(**setting_flags.given(flags, inputs.Source))
    opened = _scan(start(), **given, source=source, part=())
    with start.config.in_use(), opened as scan:
        scored = methods.of_flags(flags).scorer(scan)
        scored.prepare(outputs.local(outputs.queries_folder(flags.out)), {})

        def score(part: Sequence[Any]) -> Iterator[Iterator[dict[str, Any]]]:
            scan.source.part = part
            yield scored.stream(0)

        yield score


def score(
    config: RunConfig,
    *,
    checkpoint: str,
    queries: File,
    out: File,
    source: inputs.Source,
    method: methods.Method,
    factors: Folder | None = None,
    params: str = "auto",
    completion_tokens: Size | None = None,
    top: Size = TOP,
    length: int | None = None,
    batch_size: int = 8,
    pipeline: shards.Pipeline | None = None,
    finish: Callable[[inputs.Documents], None] | None = None,
) -> None:
    """Writes the scores of documents to `out`, or continues there.

    Args:
      config: configuration of the checkpoint's run.
      checkpoint: step or run directory, or a Hugging Face directory.
      queries: file of queries, JSON lines.
      out: write the scores to this file of JSON lines.
      source: the documents.
      method: how they are scored.
      factors: folder that `influence fit` wrote.
      params: see launch/load/load_run.py.
      completion_tokens: the model writes the completions of the queries, which have none, by greedy decoding: so many tokens at most.
        They stay in OUT.completions.jsonl, and a later start reads these. --query_checkpoint writes them, if it is set.
      top: number of top and bottom documents of each query in OUT.top.json.
      length: tokens that are read of each document; those of the factors if not set.
      batch_size: number of documents in a batch.
      pipeline: scores the documents, after this process has prepared the queries; the scores are the same.
      finish: called with the documents once they are scored.

    Raises:
      LoadError: settings or rows that do not fit, or scores of other settings in `out`.
    """
    from espalier.trainers.checkpoints import agreement

    row_files.check_output(out, "out", others={"queries": queries, "documents": source.documents})
    if method.needs_factors and factors is None:
        raise LoadError(
            f"--method={method.name} needs --factors=DIR, which `espalier influence fit` writes."
        )
    if pipeline is not None:
        _check_pipeline(source, method, completion_tokens)
    opened = functools.partial(
        _scan,
        config,
        **{"checkpoint": checkpoint, "params": params, "queries": queries, "source": source},
        **{"factors": factors, "length": length, "batch_size": batch_size},
        completion_tokens=completion_tokens,
        query_checkpoint=getattr(method, "query_checkpoint", None),
    )
    with outputs.opened(out, beside=True) as (path, push), opened(out=path) as scan:
        documents = scan.source
        record = {
            "method": method.name,
            "queries": {
                "path": paths.absolute(queries),
                "sha256": row_files.digest(queries, "queries"),
            },
            "documents": documents.record(),
            "length": documents.length,
            "per_layer": method.per_layer,
            **method.record(),
        }
        if completion_tokens is not None:
            written = outputs.completions_file(path)
            record["completions"] = {"sha256": row_files.digest(written, "out")}
            push()
        scored = method.scorer(scan)
        began = time.perf_counter()
        made = None if pipeline is None else functools.partial(_made, pipeline, scan, out)
        count = _write(path, scored, record | scored.record, out=out, push=push, made=made)
        seconds = time.perf_counter() - began
        writer = agreement.is_primary()
        if writer:
            outputs.write_top(path, top=top)
            shown = {i for chosen in outputs.shown(outputs.read_top(path), top) for i in chosen}
            row_files.write(outputs.texts_file(path), documents.texts(shown))
        if method.token_scores:
            agreement.gather("ranked")  # other processes read what the first has written
            chosen = outputs.shown(outputs.read_top(path), method.token_scores)
            rows_of_tokens = scored.token_rows(chosen)
            row_files.write(outputs.tokens_file(path), rows_of_tokens, writer=writer)
        push()
        if finish is not None:
            finish(documents)
    if writer:
        for note in [*(_NOT_COUNTED if pipeline else documents.notes()), *scored.notes()]:
            print(note)
        print(f"{count:,} documents scored for {len(scan.rows)} queries in {seconds:.1f} s: {out}")


@contextlib.contextmanager
def _scan(
    config: RunConfig,
    *,
    checkpoint: str,
    queries: str,
    source: inputs.Source,
    factors: str | None = None,
    params: str = "auto",
    length: int | None = None,
    batch_size: int = 8,
    part: Sequence[tuple[int, Any]] | None = None,
    completion_tokens: int | None = None,
    query_checkpoint: str | None = None,
    out: str = "",
) -> Iterator[methods.Scan]:
    """Context manager: loads the model and the queries; arguments as of `score`, `methods.Gradients` and `inputs.Documents`."""
    fitted = outputs.read(factors) if factors else None
    if length is None and fitted is not None:
        length = int(fitted["length"])
    with config.load(checkpoint, params=params, encoder_decoders=True) as run:
        size = source.length(run, length)
        if completion_tokens is not None:
            from espalier.launch.influence import completions

            file = outputs.completions_file(out)
            own = {"tokens": completion_tokens, "batch_size": batch_size}
            with inputs.query_run(config, run, query_checkpoint, params=params) as writer:
                completions.write(file, queries, writer, **own)
            queries = file
        yield methods.Scan(
            **{"config": config, "checkpoint": checkpoint, "params": params, "run": run},
            **{"factors": factors, "fitted": fitted},
            rows=inputs.read_queries(run, queries, size, written=completion_tokens is not None),
            source=source.of(run, size, part),
            batch_size=run.batch_size(batch_size, 1 << 30),
        )


def _check_pipeline(
    source: inputs.Source, method: methods.Method, completion_tokens: int | None
) -> None:
    if completion_tokens is not None:
        raise LoadError(
            "--completion_tokens decodes in one process, and --beam_pipeline_options scores in others: score a first document with "
            "--max_documents=1, and give its OUT.completions.jsonl as --queries."
        )
    if not method.by_document:
        raise LoadError(
            f"--method={method.name} scores all documents together, in one process: remove --beam_pipeline_options."
        )
    if source.documents is None:
        flag = "mixture" if source.sequences is None else "sequences"
        raise LoadError(
            f"--{flag} is read by one process: give --documents=FILE, or remove --beam_pipeline_options."
        )


def _write(
    path: str,
    scored: Any,
    record: Mapping[str, Any],
    *,
    out: str,
    push: Callable[[], None],
    made: Callable[[Mapping[str, Any]], shards.Shards] | None,
) -> int:
    """Writes the rows that a file does not have yet, and returns the number of all; see `outputs.opened` and `_made`."""
    import jax

    from espalier.trainers.influence.fit import SAVE_SECONDS

    folder = pathlib.Path(outputs.queries_folder(path))
    writer = jax.process_index() == 0
    record = json.loads(json.dumps(record))
    outputs.check_earlier(path, record, out)
    scored.prepare(folder, record)
    push()
    if made is not None:
        return _write_made(path, scored.source.count(), lambda: made(record), push)
    pushed = time.monotonic()
    with row_files.resumed(path, writer=writer) as rows:
        count = len(rows.rows)
        for row in scored.stream(count):
            if writer:
                rows.add({**row, **scored.source.facts(count)})
            count += 1
            if time.monotonic() - pushed > SAVE_SECONDS:
                push()
                pushed = time.monotonic()
    return count


def _write_made(
    path: str, total: int, made: Callable[[], shards.Shards], push: Callable[[], None]
) -> int:
    """Writes the rows of shards, unless all rows are there; returns their number."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            if sum(1 for _ in file) == total:
                return total
    done = made()
    row_files.write_lines(path, done.joined())
    push()
    done.remove()
    return done.rows


def _made(
    pipeline: shards.Pipeline, scan: methods.Scan, out: str, record: Mapping[str, Any]
) -> shards.Shards:
    """Returns the shards that workers of a pipeline have written."""
    from espalier.trainers.decoding.buckets import BATCHES_SORTED

    documents = scan.source
    file = row_files.local(documents.path or "", "documents")
    return pipeline.made(
        out,
        itertools.islice(documents.lines(), documents.limit),
        size=shards.size_of(BATCHES_SORTED * scan.batch_size, os.fspath(file)),
        record={"scores": record},
        reads=[outputs.queries_folder(out), *([scan.factors] if scan.factors else [])],
    )


main = load_run.command(__doc__, "influence score", _run, _add_flags, files=_default_files)

if __name__ == "__main__":
    raise SystemExit(main())
