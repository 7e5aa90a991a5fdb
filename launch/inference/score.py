"""Scores rows with a run's model: the log-probability of each token."""

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
    """Writes the rows of the file `inputs` with their scores to `output`; see launch/run/load_run.py for `params`."""
    row_files.check_output(output, compressed=True, others={"inputs": inputs})
    placed_rows = row_files.read(inputs, example=EXAMPLE)
    with config.load(checkpoint, params=params, encoder_decoders=True) as run:
        rows = [scored_row(run, row, where) for where, row in placed_rows]
        size = run.batch_size(batch_size, len(rows))
        scorer = Scorer(run.model, run.params, batch_size=size, sharding=run.row_sharding)
        sums = []

        def scored() -> Iterator[dict[str, Any]]:
            for (_, row), logp_T in zip(placed_rows, scorer.stream(rows), strict=True):
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
    """Returns a row of a file as a `Row` for the scorer.

    Raises:
      LoadError: the model cannot read the row.
    """
    if run.encodes:
        if "targets" not in row:
            raise LoadError(
                f'{where}: an encoder-decoder scores "targets" after "inputs": give both.'
            )
        targets = run.encode(row["targets"], f"{where}: 'targets'")
        inputs = run.encoder_inputs(row, where)
        return Row(context=[run.start_token or 0], targets=targets, encoder_inputs=inputs)
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
