"""Scores rows with a run's model: the log-probability of each token."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from espalier.launch.inference import row_files
from espalier.launch.load import side_by_side
from espalier.launch.load.load_run import EXAMPLE, LoadedRun, LoadError, RunConfig
from espalier.trainers.scoring.scoring import Row, Scorer


def score(
    config: RunConfig,
    *,
    checkpoint: str,
    inputs: str,
    output: str,
    params: str = "auto",
    adapter: Sequence[str] = (),
    batch_size: int = 8,
) -> None:
    """Writes the rows of the file `inputs` with their scores to `output`; see launch/load/load_run.py for `params`.

    With directories of adapters, the rows with each of them follow one another, with its "adapter".
    """
    row_files.check_output(output, compressed=True, others={"inputs": inputs})
    placed_rows = row_files.read(inputs, example=EXAMPLE)
    loads = side_by_side.load(config, checkpoint, adapter, params=params, encoder_decoders=True)
    with loads as runs:
        run = runs[0][1]
        rows = [scored_row(run, row, where) for where, row in placed_rows]
        sums: dict[str | None, float] = {}
        began = time.perf_counter()
        scorer = None

        def scored() -> Iterator[dict[str, Any]]:
            nonlocal scorer
            for name, run in runs:
                scorer = _scorer(run, batch_size, len(rows), scorer)
                sums[name] = 0.0
                for (_, row), logp_T in zip(placed_rows, scorer.stream(rows), strict=True):
                    logprobs = logp_T.tolist()
                    total = sum(logprobs)
                    sums[name] += total
                    named = {} if name is None else {"adapter": name}
                    yield {**row, **named, "logprobs": logprobs, "sum": total}

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


def _scorer(run: LoadedRun, batch_size: int, rows: int, earlier: Scorer | None) -> Scorer:
    """Returns the earlier scorer with a run's parameters if it is of the same model, else another."""
    if earlier is not None and earlier.model is run.model:
        earlier.use(run.params)
        return earlier
    size = run.batch_size(batch_size, rows)
    return Scorer(run.model, run.params, batch_size=size, sharding=run.row_sharding)


def row_of(run: LoadedRun, inputs: Sequence[int], targets: Sequence[int]) -> Row:
    """Returns targets after inputs for the scorer: an encoder-decoder encodes the inputs, other models continue them."""
    if run.encodes:
        return Row(context=[run.start_token or 0], targets=targets, encoder_inputs=inputs)
    return Row(context=inputs, targets=targets)


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
