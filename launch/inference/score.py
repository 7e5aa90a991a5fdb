"""Scores rows with a run's model: the log-probability of each token."""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from espalier.common.ranges import Size
from espalier.common.storage import output_files
from espalier.data.rows import sentences
from espalier.data.text import documents
from espalier.launch.inference import row_files, shards
from espalier.launch.load import load_run, side_by_side
from espalier.launch.load.load_run import EXAMPLE, LoadedRun, LoadError, RunConfig
from espalier.trainers.decoding import buckets
from espalier.trainers.scoring.scoring import Row, Scorer


def score(
    config: RunConfig,
    *,
    checkpoint: str,
    inputs: str,
    output: str,
    params: str = "auto",
    adapter: Sequence[str] = (),
    batch_size: Size = 8,
    pipeline: shards.Pipeline | None = None,
) -> None:
    """Writes the rows of the file `inputs` with their scores to `output`; see launch/load/load_run.py for `params`.

    With directories of adapters, the rows with each of them follow one another, with its "adapter". A pipeline writes the same
    bytes, since its workers have the same batches.
    """
    row_files.check_output(output, compressed=True, others={"inputs": inputs})
    if pipeline is not None:
        _score_by(pipeline, inputs, output, adapter, batch_size)
        return
    placed_rows = row_files.read(inputs, example=EXAMPLE)
    loads = side_by_side.load(config, checkpoint, adapter, params=params, encoder_decoders=True)
    with loads as runs:
        run = runs[0][1]
        rows = [scored_row(run, row, where) for where, row in placed_rows]
        sums: dict[str | None, float] = {}
        began = time.perf_counter()

        def scored() -> Iterator[dict[str, Any]]:
            for name, own in _streams(runs, placed_rows, rows, batch_size, len(rows), []):
                sums[name] = 0.0
                for row in own:
                    sums[name] += row["sum"]
                    yield row

        primary = jax.process_index() == 0
        row_files.write(output, scored(), writer=primary)
        seconds = time.perf_counter() - began
    if primary:
        count = sum(len(row.targets) for row in rows)
        means = [f"{name or ''} {x / max(count, 1):.4f}".strip() for name, x in sums.items()]
        print(
            f"{count:,} tokens of {len(rows):,} rows in {seconds:.1f} s; {', '.join(means)} nats a token",
            file=sys.stderr,  # --output may be /dev/stdout
        )


_Placed = Sequence[tuple[str, Mapping[str, Any]]]


def _streams(
    runs: Sequence[tuple[str | None, LoadedRun]],
    placed: _Placed,
    rows: Sequence[Row],
    batch_size: int,
    total: int,
    made: list[Scorer],
) -> Iterator[tuple[str | None, Iterator[dict[str, Any]]]]:
    """Yields for each adapter its name and the rows with their scores.

    Args:
      runs: see `side_by_side.load`.
      placed, rows: the rows of the file, and as the model reads them.
      batch_size: rows at a time, at most.
      total: number of rows of the file, of which `rows` may be a part.
      made: scorers of earlier calls, which are used again; new ones are appended.
    """
    for name, run in runs:
        scorer = _scorer(run, run.batch_size(batch_size, total), made)
        yield name, _named(name, placed, scorer.stream(rows))


def _named(
    name: str | None, placed: _Placed, scored: Iterator[np.ndarray]
) -> Iterator[dict[str, Any]]:
    named = {} if name is None else {"adapter": name}
    for (_, row), logp_T in zip(placed, scored, strict=True):
        logprobs = logp_T.tolist()
        yield {**row, **named, "logprobs": logprobs, "sum": sum(logprobs)}


def _scorer(run: LoadedRun, size: int, made: list[Scorer]) -> Scorer:
    """Returns a scorer with a run's parameters: the one of the same model, whose programs stay, or else another."""
    for scorer in made:
        if scorer.model is run.model:
            scorer.use(run.params)
            return scorer
    made.append(Scorer(run.model, run.params, batch_size=size, sharding=run.row_sharding))
    return made[-1]


def _score_by(
    pipeline: shards.Pipeline,
    inputs: str,
    output: str,
    adapter: Sequence[str],
    batch_size: int,
) -> None:
    """Writes the scores that workers of a pipeline compute."""
    if output_files.is_stream(output) or os.path.abspath(output).startswith(("/dev/", "/proc/")):
        raise row_files.RowFileError(
            f"--output={output} is no file, beside which a pipeline has its shards: give a file."
        )
    began = time.perf_counter()
    local = row_files.local(inputs, "inputs")
    record = {
        "words": pipeline.words,
        "inputs": row_files.digest(inputs, "inputs"),
    }
    done = pipeline.made(
        output,
        documents.read_json_lines(local, example=EXAMPLE),
        size=shards.size_of(buckets.BATCHES_SORTED * batch_size, os.fspath(local)),
        streams=max(1, len(adapter)),
        record=record,
        reads=(pipeline.checkpoint, *adapter),
    )
    row_files.write_lines(output, done.joined())
    done.remove()
    seconds = time.perf_counter() - began
    print(f"{done.rows:,} rows of {done.count:,} shards in {seconds:.1f} s", file=sys.stderr)


def _add_worker_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_row_flags(parser)
    # In the rows, for each --adapter, which is a step of what the user has given.
    parser.add_argument("--adapter_name", action="append", default=[])


@contextlib.contextmanager
def scorer_of(words: Sequence[str], all_shards: shards.Shards) -> Iterator[shards.Scorer]:
    """Context manager: yields what scores a shard, with the model that is loaded once; see `shards.Work`."""
    start = load_run.start_of(words, _add_worker_flags)
    flags = start.flags
    loads = side_by_side.load(
        start(), flags.checkpoint, flags.adapter, params=flags.params, encoder_decoders=True
    )
    made: list[Scorer] = []
    with start.config.in_use(), loads as placed_runs:
        names = flags.adapter_name or [None]
        runs = [(name, run) for name, (_, run) in zip(names, placed_runs, strict=True)]
        if all_shards.count > 1 and flags.batch_size % (devices := runs[0][1].row_shards):
            raise LoadError(
                f"--batch_size={flags.batch_size}: each batch of a worker is divided over {devices} devices: give a multiple."
            )

        def score(part: Sequence[Any]) -> Iterator[Iterator[dict[str, Any]]]:
            placed = [(f"{flags.inputs}, line {number}", row) for number, row in part]
            rows = [scored_row(runs[0][1], row, where) for where, row in placed]
            streams = _streams(runs, placed, rows, flags.batch_size, all_shards.rows, made)
            return (own for _, own in streams)

        yield score


def row_of(run: LoadedRun, inputs: Sequence[int], targets: Sequence[int]) -> Row:
    """Returns targets after inputs for the scorer: an encoder-decoder encodes the inputs, other models continue them."""
    if run.encodes:
        return Row(context=[run.start_token or 0], targets=targets, encoder_inputs=inputs)
    return Row(context=inputs, targets=targets)


def scored_row(run: LoadedRun, row: Mapping[str, Any], where: str) -> Row:
    """Returns a row of a file as a `Row` for the scorer.

    Raises:
      LoadError: the model cannot read the row.
      DataError: a malformed embedding of its sentence.
    """
    scored = _tokens_of(run, row, where)
    columns = sentences.columns(row, where)
    return dataclasses.replace(scored, columns=columns) if columns else scored


def _tokens_of(run: LoadedRun, row: Mapping[str, Any], where: str) -> Row:
    if run.encodes:
        if "targets" not in row:
            raise LoadError(
                f'{where}: an encoder-decoder scores "targets" after "inputs": give both.'
            )
        answer = run.encode(row["targets"], f"{where}: 'targets'")
        inputs = run.encoder_inputs(row, where)
        return row_of(run, inputs, answer)
    tokens, targets = run.scored(row, where)
    context = run.context(tokens)
    if targets is not None:
        if not context and targets:
            raise LoadError(
                f"{where}: no token precedes the targets: give text before them, or set START_TOKEN."
            )
        return Row(context=context, targets=targets)
    # An empty row has no targets, but a context needs at least one token.
    return Row(context=context[:1] or [0], targets=context[1:])
