"""Scores documents for queries: how much each document raises the log-probability of each completion.

Example, after `espalier influence fit` wrote /tmp/factors:

  espalier influence score --factors=/tmp/factors --queries=q.jsonl --documents=d.jsonl --out=/tmp/scores.jsonl

A query is {"prompt": "...", "completion": "..."}. Row i of the output has "scores", one for each query, and "norm", the norm of
the gradient of document i; a positive score means that the document makes the completion more probable. A stopped scan
continues when the same command runs again. The queries' gradients are in scores.jsonl.queries, and the top and bottom documents
of each query in scores.jsonl.top.json. --method=bm25 needs the extra `influence` (pip install 'espalier-lm[influence]').
"""

import argparse
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.common.storage import paths
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.config.setting_flags import File, Folder
from espalier.launch.inference import row_files
from espalier.launch.influence import inputs, methods, outputs
from espalier.launch.load import load_run
from espalier.launch.load.load_run import LoadError, RunConfig

_FILES = ("factors", "queries", "out")
_SIZES = ("top", "length", "batch_size")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    cli.take_addresses(parser, "factors", "query_checkpoint", "queries", "documents", "out")
    group = parser.add_argument_group("influence")
    setting_flags.add(group, score, names=_FILES)
    group.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="run, step or Hugging Face directory; by default the one that the factors were fitted on",
    )
    group.add_argument("--params", choices=load_run.PARAMS, help="by default those of the factors")
    setting_flags.add(group, inputs.Source)
    methods.add_flags(group)
    setting_flags.add(group, score, names=_SIZES)


def _default_files(flags: argparse.Namespace) -> Sequence[str]:
    if factors := getattr(flags, "factors", None):
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
    score(
        start(),
        checkpoint=flags.checkpoint,
        params=flags.params,
        source=source,
        method=methods.of_flags(flags),
        **setting_flags.given(flags, score, (*_FILES, *_SIZES)),
    )


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
    top: int = 100,
    length: int | None = None,
    batch_size: int = 8,
) -> None:
    """Writes the scores of documents to `out`, or continues there.

    Args:
      config: configuration of the checkpoint's run.
      checkpoint: step or run directory, or a Hugging Face directory.
      queries: JSON lines of queries.
      out: JSON lines of scores.
      source: the documents.
      method: how they are scored.
      factors: folder that `fit` wrote.
      params: see launch/load/load_run.py.
      top: number of top and bottom documents of each query in OUT.top.json.
      length: tokens that are read of each document; those of the factors if not set.
      batch_size: documents at a time.

    Raises:
      LoadError: settings or rows that do not fit, or scores of other settings in `out`.
    """
    from espalier.trainers.checkpoints import agreement

    row_files.check_output(out, "out", others={"queries": queries, "documents": source.documents})
    if method.needs_factors and factors is None:
        raise LoadError(
            f"--method={method.name} needs --factors=DIR, which `launch.influence fit` writes."
        )
    if top < 1:
        raise LoadError(f"--top={top} must be at least 1.")
    fitted = outputs.read(factors) if factors else None
    if length is None and fitted is not None:
        length = int(fitted["length"])
    with (
        config.load(checkpoint, params=params, encoder_decoders=True) as run,
        outputs.opened(out, beside=True) as (path, push),
    ):
        size = inputs.length_of(run, length)
        rows = inputs.read_queries(run, queries, size)
        documents = source.of(run, size)
        scan = methods.Scan(
            **{"config": config, "checkpoint": checkpoint, "params": params, "run": run},
            **{"rows": rows, "source": documents, "factors": factors, "fitted": fitted},
            batch_size=run.batch_size(batch_size, 1 << 30),
        )
        record = {
            "method": method.name,
            "queries": {
                "path": paths.absolute(queries),
                "sha256": inputs.digest(queries, "queries"),
            },
            "documents": documents.record(),
            "length": size,
            "per_layer": method.per_layer,
            **method.record(),
        }
        scored = method.scorer(scan)
        began = time.perf_counter()
        count = _write(path, scored, record | scored.record, out=out, push=push)
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
    if writer:
        for note in [*documents.notes(), *scored.notes()]:
            print(note)
        print(f"{count:,} documents scored for {len(rows)} queries in {seconds:.1f} s: {out}")


def _write(
    path: str, scored: Any, record: Mapping[str, Any], *, out: str, push: Callable[[], None]
) -> int:
    """Writes the rows that a file does not have yet, and returns the number of all; see `outputs.opened`."""
    import jax

    from espalier.trainers.influence import files
    from espalier.trainers.influence.fit import SAVE_SECONDS

    folder = pathlib.Path(outputs.queries_folder(path))
    writer = jax.process_index() == 0
    record = json.loads(json.dumps(record))
    if files.exists(folder):
        _, other = files.read(folder)
        if names := sorted(name for name in record if other.get(name) != record[name]):
            raise LoadError(
                f"--out={out} has scores of other {', '.join(names)}: give another file, or delete it and "
                f"{outputs.queries_folder(out)}."
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


main = load_run.command(__doc__, "influence score", _run, _add_flags, files=_default_files)

if __name__ == "__main__":
    raise SystemExit(main())
