"""Gives each token of texts the log-probability that a trained model gives it.

Example, after a run in /tmp/espalier_tiny (see python -m launch.train --help):

  echo '{"text": "import os\\n"}' > /tmp/x.jsonl
  python -m launch.score --checkpoint=/tmp/espalier_tiny --inputs=/tmp/x.jsonl --output=/tmp/y.jsonl

Rows are {"text": "..."} or {"tokens": [...]}, each with optional "targets" (a text or tokens), or
{"messages": [...]}, of which an assistant's turn at the end is the targets. They come back in order
with "logprobs", one natural logarithm per predicted token, and their "sum". Predicted are the targets,
given what is before them; without targets every token of the row. What precedes the first token is the
model's START_TOKEN; where that is None the first token of a row is only read. Rows that are done are in
y.jsonl.partial until all are.
"""

if __name__ == "__main__":
    from launch import cli
    from launch.run import load_run

    def start_run(start):
        from launch import score

        flags = start.flags
        score.score(
            start(),
            checkpoint=flags.checkpoint,
            params=flags.params,
            inputs=flags.inputs,
            output=flags.output,
            batch_size=flags.batch_size,
        )

    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.run.load_run:RunConfig",
            command="score",
            extra_flags=load_run.add_row_flags,
            run=start_run,
            default_files=load_run.default_files,
            unused={"VOCABULARY": "None"},
        )
    )

import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from launch.inference import row_files
from launch.run.load_run import EXAMPLE, LoadedRun, LoadError, RunConfig
from trainers.scoring.scoring import Row, Scorer


def score(
    config: RunConfig,
    *,
    checkpoint: str,
    inputs: str,
    output: str,
    params: str = "auto",
    batch_size: int = 8,
) -> None:
    """Scores a file of rows.

    Args:
      config: of the run that made the checkpoint.
      checkpoint: step or run directory.
      inputs: file of rows.
      output: file for the rows with their scores.
      params: see launch/run/load_run.py.
      batch_size: rows at a time.
    """
    row_files.check_output(output)
    given = row_files.read(inputs, example=EXAMPLE)
    with config.load(checkpoint, params=params) as run:
        rows = [scored_row(run, row, where) for where, row in given]
        size = run.batch_size(batch_size, len(rows))
        scorer = Scorer(run.model, run.params, batch_size=size, sharding=run.row_sharding)
        sums = []

        def scored() -> Iterator[dict[str, Any]]:
            for (_, row), logp_T in zip(given, scorer.stream(rows), strict=True):
                logprobs = logp_T.tolist()
                sums.append(sum(logprobs))
                yield {**row, "logprobs": logprobs, "sum": sums[-1]}

        primary = jax.process_index() == 0
        began = time.perf_counter()
        row_files.write(output, scored(), writer=primary)
        seconds = time.perf_counter() - began
    if primary:
        count = sum(len(row.targets) for row in rows)
        mean = sum(sums) / max(count, 1)
        print(f"{count:,} tokens of {len(rows):,} rows in {seconds:.1f} s; {mean:.4f} nats a token")


def scored_row(run: LoadedRun, row: Mapping[str, Any], where: str) -> Row:
    """A row of a file as the scorer takes it.

    Raises:
      LoadError: one that the model cannot read.
    """
    tokens, targets = run.scored(row, where)
    context = run.context(tokens)
    if targets is not None:
        if not context and targets:
            raise LoadError(f"{where}: nothing precedes the targets, and START_TOKEN is None.")
        return Row(context=context, targets=targets)
    # An empty row has no token to predict, and one to stand before none.
    return Row(context=context[:1] or [0], targets=context[1:])
