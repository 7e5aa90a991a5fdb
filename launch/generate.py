"""Continues texts with a trained model: greedily, sampled, or by beam search.

Example, after a run in /tmp/espalier_tiny (see python -m launch.train --help):

  python -m launch.generate --checkpoint=/tmp/espalier_tiny --prompt='def main(' --temperature=0.7

With --inputs=x.jsonl and --output=y.jsonl, rows {"text": "..."}, {"messages": [...]}, {"tokens":
[...]} or {"prompt": ...}, a text or messages, as files of prompts and of preference pairs have it, come
back in order, --num_samples of each, their prompt as "prompt", with "text" and "tokens" of
the continuation and "logprobs", the model's natural logarithms of the tokens' probabilities at
temperature 1; "score" of a beam; "sample", from 0; and in "ended" what ended it: "eos", "stop" or
"length". EOS is among its tokens but not in its text; text is cut before a --stop, whose tokens are
kept. A run that names no VOCABULARY continues tokens alone, without "text", and --eos_id says which of
them end. Rows that are done are in y.jsonl.partial until all are. A row's continuation depends on
--seed and its index, not on the rows beside it.
"""

if __name__ == "__main__":
    from launch import cli, generate_flags
    from launch.run import load_run

    def start_run(start):
        from launch import generate

        generate.run(start)

    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.run.load_run:RunConfig",
            command="generate",
            extra_flags=generate_flags.add,
            run=start_run,
            default_files=load_run.default_files,
            unused={"VOCABULARY": "None"},
        )
    )

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from launch import generate_flags
from launch.inference import generate_text, row_files
from launch.run.load_run import EXAMPLE, LoadError, RunConfig
from model.kv_cache.base import CachePolicy
from model.kv_cache.full import FullCache
from trainers.decoding.decode import Settings
from trainers.decoding.decoder import Decoder, Stats

# Between two looks at what has been generated: a look costs less than a tenth of a token.
_LOOK_AT_STOPS, _LOOK_AT_STREAM = 16, 1
_PROMPT_KEYS = frozenset(("text", "messages", "tokens"))


def run(start: Any) -> None:
    """Generates as the flags say.

    Raises:
      LoadError: flags that do not go together.
    """
    flags = start.flags
    options = generate_flags.options(flags)
    if flags.prompt is not None:
        _print(start(), flags, options)
        return
    row_files.check_output(flags.output)
    given = row_files.read(flags.inputs, example=EXAMPLE)
    rows = generate(start(), [(where, _to_continue(row)) for where, row in given], **options)
    row_files.write(flags.output, rows, writer=jax.process_index() == 0)


def _to_continue(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row that has a "prompt" alone, as data/prompts and data/preference read it, by the keys of this command."""
    if "prompt" not in row or not _PROMPT_KEYS.isdisjoint(row):
        return row
    prompt = row["prompt"]
    others = {key: value for key, value in row.items() if key != "prompt"}
    return {**others, "text" if isinstance(prompt, str) else "messages": prompt}


def _print(config: RunConfig, flags: Any, options: dict[str, Any]) -> None:
    """Continues --prompt on standard output."""
    settings = options["settings"]
    single = settings.num_samples == 1 and settings.beams is None
    stream = sys.stdout.isatty() and single if flags.stream is None else flags.stream
    writes = jax.process_index() == 0
    show = None
    if stream:
        show = generate_text.to_terminal if writes else lambda piece: None
    rows = generate(config, [("--prompt", {"text": flags.prompt})], show=show, **options)
    for row in rows:
        if not writes:
            continue
        if row["sample"]:
            print(f"--- sample {row['sample']}")
        generate_text.to_terminal("\n" if stream else row["text"] + "\n")


def generate(
    config: RunConfig,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    checkpoint: str,
    params: str = "auto",
    settings: Settings,
    eos_ids: Sequence[int] | None = None,
    stops: Sequence[str] = (),
    seed: int = 0,
    policy: CachePolicy | None = None,
    policy_name: str = "full",
    cache_dtype: str | None = None,
    prefill_chunk: int | None = None,
    batch_size: int = 8,
    show: Callable[[str], None] | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Continues rows.

    Args:
      config: of the run that made the checkpoint.
      rows: (place, row) as in row_files.read.
      checkpoint: step or run directory.
      params: see launch/run/load_run.py.
      settings: what to generate; its ends and the size of its vocabulary are those of the run.
      eos_ids: tokens that end a continuation; None for the vocabulary's.
      stops: texts that end one.
      seed: of the draws; a row's depend on it, on the row's index and on the sample's alone.
      policy: of the key/value caches; None to keep everything.
      policy_name: of the policy, for the report.
      cache_dtype: in which keys and values are kept; None for the model's.
      prefill_chunk: tokens of prompts that are read at a time; None for all.
      batch_size: rows at a time, each with all its samples.
      show: called with the text of a single row as it grows.
      indices: of the rows among all that there are, where these are not all; their draws are the same.

    Yields:
      The rows with their continuations, `settings.num_samples` for each, as they are done.

    Raises:
      LoadError: rows that cannot be read, or stops without a vocabulary.
    """
    with config.load(checkpoint, params=params) as loaded:
        prompts = [loaded.context(loaded.tokens(row, where)) for where, row in rows]
        if empty := [where for (where, _), prompt in zip(rows, prompts, strict=True) if not prompt]:
            raise LoadError(f"{empty[0]}: the prompt is empty, and START_TOKEN is None.")
        vocabulary = loaded.vocabulary_or_none
        if vocabulary is None and stops:
            raise LoadError("--stop needs texts, and the run's configuration sets no VOCABULARY.")
        settings = dataclasses.replace(
            settings,
            eos_ids=tuple(loaded.eos_ids if eos_ids is None else eos_ids),
            num_ids=vocabulary.vocab_size if vocabulary else loaded.model.config.vocab_size,
        )
        texts = generate_text.Texts(
            None if vocabulary is None else generate_text.decoder_of(vocabulary),
            ends=settings.ends,
            stops=stops,
            show=show,
        )
        decoder = Decoder(
            loaded.model,
            loaded.params,
            settings,
            policy=FullCache() if policy is None else policy,
            batch_size=loaded.batch_size(batch_size, len(rows)),
            sharding=loaded.row_sharding,
            cache_dtype=cache_dtype,
            prefill_chunk=prefill_chunk,
            watch=texts.watch if texts.watching else None,
            watch_every=_LOOK_AT_STOPS if show is None else _LOOK_AT_STREAM,
        )
        found = decoder.stream(prompts, seed=seed % 2**32, indices=indices)
        for i, (_, row) in enumerate(rows):
            for sample in range(settings.num_samples):
                yield texts.answer(row, i, sample, next(found))
        if jax.process_index() == 0:
            print(_costs(decoder.stats, policy_name, cache_dtype), file=sys.stderr)


def _costs(stats: Stats, policy_name: str, cache_dtype: str | None) -> str:
    kept = policy_name if cache_dtype is None else f"{policy_name}, {cache_dtype}"
    return (
        f"{stats.new_tokens:,} new tokens, {stats.tokens_per_second:,.1f} tokens/s (prefill of "
        f"{stats.prompt_tokens:,} tokens {stats.prefill_seconds:.2f} s, decoding "
        f"{stats.decode_seconds:.2f} s, compilation before {stats.compile_seconds:.1f} s); cache "
        f"({kept}) {stats.cache_bytes:,} bytes a batch"
    )
