"""Completions that the model itself writes for the queries, by greedy decoding: what a query explains is then the model's own answer.

They are in a file beside the scores, which is made once. A later start reads it, and never decodes again.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.launch.inference import generate, row_files
from espalier.launch.influence import inputs
from espalier.launch.load.load_run import LoadedRun, LoadError

# What rows have more than the queries.
_OWN = ("completion", "completion_tokens", "ended", "written_by")
_Placed = Sequence[tuple[str, Mapping[str, Any]]]


def write(file: str, queries: str, run: LoadedRun, *, tokens: int, batch_size: int) -> None:
    """Writes queries with completions to a file, or checks those that an earlier start has written.

    A row has `completion`, its text (ids without a vocabulary), `completion_tokens` without the token that ends it, `ended`, and
    `written_by`, what the completion depends on.

    Args:
      file: JSON lines of the queries with completions.
      queries: JSON lines of the queries.
      run: the model that writes.
      tokens: number of new tokens at most.
      batch_size: rows at a time.

    Raises:
      LoadError: a query has a completion, the model writes none, or the file is of another model or other queries.
    """
    from espalier.trainers.checkpoints import agreement
    from espalier.trainers.influence import files

    placed = row_files.read(queries, example=inputs.QUERY_EXAMPLE, flag="queries")
    for where, row in placed:
        if "prompt" not in row:
            raise LoadError(f"{where} has no 'prompt'.")
        if "completion" in row:
            raise LoadError(
                f"{where} has a completion, and with --completion_tokens the model writes it: remove one of the two."
            )
    made = {"model": files.model_digest(run.params), "tokens": tokens}
    if not all(agreement.gather(os.path.exists(file))):
        new = ({**row, "written_by": made} for row in _written(run, placed, tokens, batch_size))
        row_files.write(file, new, writer=agreement.is_primary())
        agreement.gather("written")  # other processes read what the first has written
    stored = row_files.read(file, example="{...}", flag="out")
    asked = [{key: x for key, x in row.items() if key not in _OWN} for _, row in stored]
    if asked != [dict(row) for _, row in placed] or any(
        row.get("written_by") != made for _, row in stored
    ):
        raise LoadError(
            f"{file} has completions of other queries, of another model or of other --completion_tokens: give another --out, or "
            "delete this file."
        )


def _written(
    run: LoadedRun, placed: _Placed, tokens: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yields the queries with what the model writes now."""
    from espalier.trainers.decoding.settings import Settings

    decoding = generate.Decoding(settings=Settings(max_new_tokens=tokens), batch_size=batch_size)
    decoder, texts = generate.decoder_and_texts(run, decoding, rows=len(placed))
    prompts = [
        generate.prompt_of(run, inputs.prompt_row(run, row["prompt"], where), where)
        for where, row in placed
    ]
    for (where, row), new in zip(placed, decoder.stream(prompts, seed=0), strict=True):
        text, ended = texts.text(new.tokens)
        own = [int(id) for id in (new.tokens[:-1] if ended == "eos" else new.tokens)]
        if not own:
            raise LoadError(
                f"{where}: the model ends its answer at once, so there is nothing to explain: change the prompt, or remove the "
                "query."
            )
        completion = own if run.vocabulary_or_none is None else text
        yield {**row, "completion": completion, "completion_tokens": own, "ended": ended}
