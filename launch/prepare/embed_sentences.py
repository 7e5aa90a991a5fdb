"""Adds to each row the embedding of its sentence by a frozen model, for routers of adapters that read sentences.

A sentence is what a row asks: its "inputs" or "prompt", its "messages" before the first answer, or its "text"; with --key the
text of another key. The embedding is the mean of the final states of the model at its tokens, of an encoder-decoder the mean of
its encoder's (as in Sentence-T5, arXiv 2108.08877), divided by its root mean square. Rows keep all of their keys, and get
"sentence_embedding", a list of numbers:

  espalier prepare embed_sentences --checkpoint=T5 --inputs=examples.jsonl --output=embedded.jsonl

The model may have any vocabulary and width. A run reads the embeddings as part of its examples (docs/use/adapters.md), and so do
espalier score and espalier generate.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.config.setting_flags import File, Name
from espalier.launch.load import load_run

EXAMPLE = '{"inputs": "...", "targets": "..."}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedFlags:
    """Flags of `espalier prepare embed_sentences`.

    Attributes:
      inputs: read texts from this file of JSON lines.
      output: write the rows with embeddings to this file.
      key: key of the text in a row (default: inputs, prompt, messages or text).
      batch_size: number of rows in a batch.
    """

    inputs: File
    output: File
    key: Name | None = None
    batch_size: int = 32


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    setting_flags.add(parser.add_argument_group("rows"), EmbedFlags)


def _run(start: cli.Start) -> None:
    """Embeds the sentences of all rows.

    Raises:
      LoadError: a row without a sentence, or which the model cannot read.
    """
    import jax
    import numpy as np

    from espalier.data.stream.rows import SENTENCE
    from espalier.launch.inference import row_files
    from espalier.trainers.scoring.scoring import MeanStates, Row

    flags = setting_flags.filled(start.flags, EmbedFlags)
    row_files.check_output(flags.output, compressed=True, others={"inputs": flags.inputs})
    placed = row_files.read(flags.inputs, example=EXAMPLE)
    with start().load(flags.checkpoint, params=flags.params, encoder_decoders=True) as run:
        before = [] if run.encodes else run.context([])

        def read(row: Mapping[str, Any], where: str) -> Row:
            asked = sentence_of(row, where, flags.key)
            ids = run.encoder_inputs(asked, where) if run.encodes else run.tokens(asked, where)
            if not ids:
                raise load_run.LoadError(f"{where}: the sentence has no token to embed.")
            return Row(context=before, targets=ids)

        rows = [read(row, where) for where, row in placed]
        size = run.batch_size(flags.batch_size, len(rows))
        states = MeanStates(run.model, run.params, batch_size=size, sharding=run.row_sharding)

        def embedded() -> Iterator[dict[str, Any]]:
            means = states.stream(rows, title="sentences")
            for (_, row), mean_D in zip(placed, means, strict=True):
                scale = np.sqrt(np.square(mean_D, dtype=np.float64).mean() + 1e-6)
                yield {**row, SENTENCE: (mean_D / scale).tolist()}

        row_files.write(flags.output, embedded(), writer=jax.process_index() == 0)


def sentence_of(row: Mapping[str, Any], where: str, key: str | None = None) -> dict[str, Any]:
    """Returns what a row asks, as the row of a prompt.

    Raises:
      LoadError: it has no such key.
    """
    if key is not None:
        if not isinstance(row.get(key), str):
            raise load_run.LoadError(f"{where}: {key!r} is no text, which --key names.")
        return {"text": row[key]}
    if "messages" in row:
        asked = itertools.takewhile(lambda one: one.get("role") != "assistant", row["messages"])
        return {"messages": list(asked)}
    for name in ("inputs", "prompt", "text"):
        if isinstance(row.get(name), str):
            return {"text": row[name]}
        if name in row:
            of_ids = all(type(item) is int for item in row[name])
            return {"tokens" if of_ids else "messages": row[name]}
    raise load_run.LoadError(
        f"{where}: no 'inputs', 'prompt', 'messages' or 'text' to embed: name its key with --key."
    )


main = load_run.command(__doc__, "prepare embed_sentences", _run, _add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
