"""Continues texts with a trained model: greedily, or sampled.

Example, after a run in /tmp/espalier_tiny (see python -m launch.train --help):

  python -m launch.generate --checkpoint=/tmp/espalier_tiny --prompt='def main(' --temperature=0.7

With --inputs=x.jsonl and --output=y.jsonl, rows {"text": "..."} or {"tokens": [...]} come back in
order, their prompt as "prompt", with "text" and "tokens" of the continuation and "logprobs", the
model's natural logarithms of the tokens' probabilities at temperature 1. A continuation ends with
EOS, which is among its tokens but not in its text, or after --max_new_tokens. A run that names no
VOCABULARY continues tokens alone, without "text", and --eos_id says which of them ends. Rows that
are done are in y.jsonl.partial until all are.
"""

if __name__ == "__main__":
    from launch import cli, load_run

    def add_flags(parser):
        load_run.add_row_flags(parser, required=False)
        group = parser.add_argument_group("generation")
        group.add_argument(
            "--prompt", metavar="TEXT", help="one text to be continued on standard output"
        )
        group.add_argument("--max_new_tokens", type=int, default=128, metavar="N")
        group.add_argument(
            "--temperature",
            type=float,
            default=0.0,
            metavar="X",
            help="0 (default) takes the most probable token each time",
        )
        group.add_argument(
            "--top_k", type=int, metavar="K", help="draw among the K most probable tokens"
        )
        group.add_argument(
            "--top_p",
            type=float,
            metavar="P",
            help="draw among the fewest most probable tokens that have probability P together",
        )
        group.add_argument(
            "--eos_id", type=int, metavar="ID", help="in place of the vocabulary's EOS; -1 for none"
        )
        group.add_argument("--seed", type=int, default=0, metavar="N")
        group.add_argument(
            "--cache_policy",
            default="full",
            metavar="NAME",
            help="what is kept of keys and values, see model/kv_cache/policies.py (default full)",
        )

    def start_run(start):
        from launch import generate

        generate.run(start)

    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.load_run:RunConfig",
            command="generate",
            extra_flags=add_flags,
            run=start_run,
            default_files=load_run.default_files,
            unused={"VOCABULARY": "None"},
        )
    )

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from launch import row_files
from launch.load_run import EXAMPLE, LoadedRun, LoadError, RunConfig
from model.kv_cache.policies import policy_named
from trainers.decode import NO_EOS, Settings
from trainers.decoder import Continuation, Decoder, Stats
from trainers.sampling import Sampling


def run(start: Any) -> None:
    """Generates as the flags say.

    Raises:
      LoadError: flags that do not go together.
    """
    flags = start.flags
    files = (flags.inputs, flags.output)
    if (flags.prompt is None) == (files == (None, None)) or (None in files) != (
        files == (None,) * 2
    ):
        raise LoadError("Give either --prompt=TEXT, or --inputs=FILE and --output=FILE.")
    options = {
        "checkpoint": flags.checkpoint,
        "params": flags.params,
        "sampling": Sampling(temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p),
        "max_new_tokens": flags.max_new_tokens,
        "eos_id": flags.eos_id,
        "seed": flags.seed,
        "cache_policy": flags.cache_policy,
        "batch_size": flags.batch_size,
    }
    if flags.prompt is not None:
        (row,) = generate(start(), [("--prompt", {"text": flags.prompt})], **options)
        print(row["text"])
        return
    row_files.check_output(flags.output)
    rows = generate(start(), row_files.read(flags.inputs, example=EXAMPLE), **options)
    row_files.write(flags.output, rows, writer=jax.process_index() == 0)


def generate(
    config: RunConfig,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    checkpoint: str,
    params: str = "auto",
    sampling: Sampling,
    max_new_tokens: int = 128,
    eos_id: int | None = None,
    seed: int = 0,
    cache_policy: str = "full",
    batch_size: int = 8,
) -> Iterator[dict[str, Any]]:
    """Continues rows.

    Args:
      config: of the run that made the checkpoint.
      rows: (place, row) as in row_files.read.
      checkpoint: step or run directory.
      params: see launch/load_run.py.
      sampling: choice of the next token.
      max_new_tokens: at most so many.
      eos_id: the token that ends a continuation, NO_EOS for none; None for the vocabulary's.
      seed: of the draws; a row's depend on it and on the row's index alone.
      cache_policy: name in model/kv_cache/policies.py.
      batch_size: rows at a time.

    Yields:
      The rows with their continuations, as they are done.
    """
    policy = policy_named(cache_policy)
    with config.load(checkpoint, params=params) as loaded:
        prompts = [loaded.context(loaded.tokens(row, where)) for where, row in rows]
        if empty := [where for (where, _), prompt in zip(rows, prompts, strict=True) if not prompt]:
            raise LoadError(f"{empty[0]}: the prompt is empty, and START_TOKEN is None.")
        vocabulary = loaded.vocabulary_or_none
        if eos_id is None:
            eos_id = getattr(vocabulary, "eos_id", None)
        settings = Settings(
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_id=NO_EOS if eos_id is None else eos_id,
            num_ids=vocabulary.vocab_size if vocabulary else loaded.model.config.vocab_size,
        )
        decoder = Decoder(
            loaded.model,
            loaded.params,
            settings,
            policy=policy,
            batch_size=loaded.batch_size(batch_size, len(rows)),
            sharding=loaded.row_sharding,
        )
        found = decoder.stream(prompts, seed=seed % 2**32)
        for (_, row), new in zip(rows, found, strict=True):
            yield _answer(loaded, settings.eos_id, row, new)
        if jax.process_index() == 0:
            print(_costs(decoder.stats), file=sys.stderr)


def _costs(stats: Stats) -> str:
    return (
        f"{stats.new_tokens:,} new tokens, {stats.tokens_per_second:,.1f} tokens/s (prefill of "
        f"{stats.prompt_tokens:,} tokens {stats.prefill_seconds:.2f} s, decoding "
        f"{stats.decode_seconds:.2f} s, compilation before {stats.compile_seconds:.1f} s); cache "
        f"{stats.cache_bytes:,} bytes a batch"
    )


def _answer(
    loaded: LoadedRun, eos_id: int, row: Mapping[str, Any], new: Continuation
) -> dict[str, Any]:
    text = {}
    if loaded.vocabulary_or_none is not None:
        ended = new.tokens and new.tokens[-1] == eos_id
        text = {"text": _decode(loaded.vocabulary, new.tokens[:-1] if ended else new.tokens)}
    others = {key: value for key, value in row.items() if key not in ("text", "tokens")}
    prompt = row["text"] if "text" in row else row["tokens"]
    return {
        **others,
        "prompt": prompt,
        **text,
        "tokens": new.tokens,
        "logprobs": new.log_probs,
    }


def _decode(vocabulary: Any, tokens: Sequence[int]) -> str:
    """The text of all tokens; SeqIO's `decode` stops at EOS, which does not end every continuation."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == vocabulary.eos_id:
            parts.append([])
        else:
            parts[-1].append(token)
    return "".join(vocabulary.decode(part) for part in parts)
