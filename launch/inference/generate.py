"""Continues rows with a run's model, and writes or shows their continuations."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from espalier.data.rows import sentences
from espalier.launch.inference import row_files
from espalier.launch.inference.texts import (
    PROMPT_KEYS,
    Agreement,
    Healed,
    Texts,
    TokenHealing,
    compared,
    decoder_of,
)
from espalier.launch.load import side_by_side
from espalier.launch.load.load_run import EXAMPLE, LoadedRun, LoadError, RunConfig
from espalier.model.kv_cache.base import CachePolicy
from espalier.model.kv_cache.full import FullCache
from espalier.trainers.decoding.decoder import Decoder, Stats
from espalier.trainers.decoding.settings import Settings

# New tokens between two checks of the texts: a check takes less than a tenth of the time of a token.
LOOK_AT_STOPS, LOOK_AT_STREAM = 16, 1


def generate_file(
    config: RunConfig, *, inputs: str, output: str, chat: bool = False, **options: Any
) -> None:
    """Continues the rows of a file; see `generate` for the options. With `chat`, texts are the user's messages."""
    row_files.check_output(output, compressed=True, others={"inputs": inputs})
    rows = [(where, with_prompt_key(row)) for where, row in row_files.read(inputs, example=EXAMPLE)]
    if chat:
        rows = [(where, as_message(row)) for where, row in rows]
    continued = generate(config, rows, notes=True, **options)
    row_files.write(output, continued, writer=jax.process_index() == 0)


def as_message(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a row with its "text" as a conversation: the user's only message."""
    if "text" not in row:
        return row
    rest = {key: value for key, value in row.items() if key != "text"}
    return {**rest, "messages": [{"role": "user", "content": row["text"]}]}


def with_prompt_key(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a row with its "prompt" or "inputs" as "text", "messages" or "tokens".

    Rows of preferences have a "prompt", and rows of encoder-decoders "inputs".
    """
    key = next((key for key in ("prompt", "inputs") if key in row), None)
    if key is None or not row.keys().isdisjoint(PROMPT_KEYS):
        return row
    prompt = row[key]
    rest = {name: value for name, value in row.items() if name != key}
    if isinstance(prompt, str):
        return {**rest, "text": prompt}
    of_ids = key == "inputs" and isinstance(prompt, list)
    return {**rest, "tokens" if of_ids else "messages": prompt}


def print_continuations(
    config: RunConfig,
    prompt: str,
    *,
    stream: bool | None,
    settings: Settings,
    chat: bool = False,
    adapter: Sequence[str] = (),
    **options: Any,
) -> None:
    """Prints the continuations of a text, or with `chat` the answers to it; see `generate` for the options.

    With `stream`, text is printed while it is generated; None does so on a terminal.
    """
    single = settings.num_samples == 1 and settings.beams is None and len(adapter) < 2
    stream = sys.stdout.isatty() and single if stream is None else stream
    writes = jax.process_index() == 0
    show = (to_terminal if writes else lambda piece: None) if stream else None
    row: dict[str, Any] = {"text": prompt}
    rows = [("--prompt", as_message(row) if chat else row)]
    options |= {"settings": settings, "adapter": adapter, "show": show, "notes": True}
    named = None
    for row in generate(config, rows, **options):
        if not writes:
            continue
        if len(adapter) > 1 and row["adapter"] != named:
            named = row["adapter"]
            print(f"--- {named}")
        if row["sample"]:
            print(f"--- sample {row['sample']}")
        to_terminal("\n" if stream else row["text"] + "\n")
        if "full" in row:
            same = "the same" if row["full"]["tokens"] == row["tokens"] else row["full"]["text"]
            to_terminal(f"--- full cache: {same}\n")


def to_terminal(piece: str) -> None:
    """Prints and flushes text; characters that the terminal's encoding lacks become escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(piece.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a run's model decodes.

    Attributes:
      settings: generation settings; the ids that end a row and the size of the vocabulary are set from the run.
      eos_ids: tokens that end a continuation; None for the vocabulary's EOS.
      stops: texts that end a continuation.
      policy: policy of the key/value caches, which by default cache all tokens.
      policy_name: name of the policy, for the report.
      cache_dtype: dtype of cached keys and values; None for the model's dtype.
      prefill_chunk: tokens of prompts that are processed at a time; None for all.
      batch_size: rows at a time, each with all its samples.
    """

    settings: Settings
    eos_ids: Sequence[int] | None = None
    stops: Sequence[str] = ()
    policy: CachePolicy | None = None
    policy_name: str = "full"
    cache_dtype: str | None = None
    prefill_chunk: int | None = None
    batch_size: int = 8


def generate(
    config: RunConfig,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    checkpoint: str,
    params: str = "auto",
    adapter: Sequence[str] = (),
    seed: int = 0,
    show: Callable[[str], None] | None = None,
    indices: Sequence[int] | None = None,
    notes: bool = False,
    token_healing: bool | None = False,
    compare: bool = False,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Continues rows.

    Args:
      config: configuration of the run.
      rows: (place, row) of row_files.read.
      checkpoint: step or run directory.
      params: see launch/load/load_run.py.
      adapter: directories of adapters of this checkpoint, whose continuations follow one another, with an "adapter" each.
      seed: seed of sampling; a continuation depends only on it, the row's index and the sample's index.
      show: called with each new piece of the text of a single row.
      notes: whether to print lines on texts that are continued without the model's chat template, or end with a space.
      token_healing: whether the last token of a text is drawn again, see `TokenHealing`. Rows of tokens
        and conversations are continued as they are. None draws it again where the model continues its prompts.
      indices: indices of the rows among all rows, if these are a part; their continuations are then the same.
      compare: whether to continue the rows also with the full cache, see `Agreement`.
      **options: of `Decoding`.

    Yields:
      The rows with their continuations, `settings.num_samples` for each, as they finish.

    Raises:
      LoadError: rows that cannot be read, stops without a vocabulary, or `token_healing` of an encoder's inputs or
        where no row is a text.
      ValueError: a cache policy or chunks of prompts for an encoder-decoder.
    """
    loads = side_by_side.load(config, checkpoint, adapter, params=params, encoder_decoders=True)
    decoding = Decoding(**options)
    choices: dict[str, Any] = {
        "num_samples": decoding.settings.num_samples,
        "seed": seed,
        "indices": indices,
        "token_healing": token_healing,
    }
    agreement = Agreement()
    with loads as runs:
        decoder = None
        for name, loaded in runs:
            if notes and decoder is None and jax.process_index() == 0:
                print(f"loaded {loaded.size:,} parameters, compiling", file=sys.stderr, flush=True)
                _print_notes(loaded, rows, token_healing=token_healing)
            if compare:
                loaded.unroll()  # once for both decoders
            if decoder is None or decoder.model is not loaded.model:
                decoder, texts = decoder_and_texts(loaded, decoding, rows=len(rows), show=show)
            else:
                decoder.use(loaded.params)
            answers = continued(loaded, decoder, texts, rows, **choices)
            if compare:
                whole = dataclasses.replace(decoding, policy=None, cache_dtype=None)
                full, full_texts = decoder_and_texts(loaded, whole, rows=len(rows))
                same = continued(loaded, full, full_texts, rows, **choices)
                answers = compared(answers, same, agreement)
            for answer in answers:
                yield answer if name is None else {**answer, "adapter": name}
        if jax.process_index() == 0:
            assert decoder is not None  # there is a run
            print(
                _costs(decoder.stats, decoding.policy_name, decoding.cache_dtype), file=sys.stderr
            )
            if compare:
                print(_costs(full.stats, "full", None), agreement, sep="\n", file=sys.stderr)


def continued(
    loaded: LoadedRun,
    decoder: Decoder,
    texts: Texts,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    num_samples: int,
    seed: int,
    indices: Sequence[int] | None = None,
    token_healing: bool | None = False,
) -> Iterator[dict[str, Any]]:
    """Continues rows with what `decoder_and_texts` returned, perhaps for other rows; see `generate`."""
    prompts = _prompts(loaded, rows, token_healing=token_healing)
    texts.begin({i: prompt.text for i, prompt in enumerate(prompts)})
    first = [prompt.first for prompt in prompts]
    continuations = decoder.stream(
        [prompt.tokens for prompt in prompts],
        seed=seed % 2**32,
        indices=indices,
        first=first if any(first) else None,
        columns=_columns(rows),
    )
    for i, (_, row) in enumerate(rows):
        for sample in range(num_samples):
            yield texts.answer(row, i, sample, next(continuations))


def _columns(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns what layers read of each row besides its tokens; empty if no row has any."""
    columns = [sentences.columns(row, where) for where, row in rows]
    if any(columns) and (lacking := [rows[i][0] for i, own in enumerate(columns) if not own]):
        raise LoadError(
            f"{lacking[0]}: no 'sentence_embedding', which other rows have: give one to each, or to none."
        )
    return columns if any(columns) else []


def _prompts(
    loaded: LoadedRun, rows: Sequence[tuple[str, Mapping[str, Any]]], *, token_healing: bool | None
) -> list[Healed]:
    if token_healing and loaded.encodes:
        raise LoadError(
            "An encoder-decoder does not continue its inputs, whose last token stays: remove token_healing."
        )
    heals = token_healing is not False and not loaded.encodes
    vocabulary = loaded.vocabulary_or_none if heals else None
    heal = None if vocabulary is None else TokenHealing(vocabulary)
    if token_healing and rows and not (heal and any("text" in row for _, row in rows)):
        raise LoadError(
            "token_healing draws the last token of a text anew, and no prompt is a text: remove it."
        )
    prompts = []
    for where, row in rows:
        prompt = prompt_of(loaded, row, where)
        prompts.append(heal(prompt) if heal and row.get("text") else Healed(tokens=prompt))
    return prompts


def prompt_of(loaded: LoadedRun, row: Mapping[str, Any], where: str) -> list[int]:
    """Returns the tokens that the model reads before it continues a row; raises LoadError if there are none."""
    if loaded.encodes:
        return loaded.encoder_inputs(row, where)
    prompt = loaded.context(loaded.tokens(row, where))
    if not prompt:
        raise LoadError(f"{where}: the prompt is empty: give text, or set START_TOKEN.")
    return prompt


def _print_notes(
    loaded: LoadedRun, rows: Sequence[tuple[str, Mapping[str, Any]]], *, token_healing: bool | None
) -> None:
    """Prints a line if the model's chat template would render texts, and one if texts end with a space."""
    texts = [row["text"] for _, row in rows if isinstance(row.get("text"), str)]
    if texts and getattr(loaded.vocabulary_or_none, "chat_template", None) is not None:
        print(
            "The model has a chat template; texts are continued without it: see --chat.",
            file=sys.stderr,
        )
    spaces = sum(text.endswith(" ") for text in texts)
    if spaces and token_healing is False and not loaded.encodes:
        print(
            f"{spaces:,} of {len(texts):,} texts end with a space, after which most vocabularies have no word: see "
            "--token_healing.",
            file=sys.stderr,
        )


def decoder_and_texts(
    loaded: LoadedRun,
    decoding: Decoding,
    *,
    rows: int,
    show: Callable[[str], None] | None = None,
) -> tuple[Decoder, Texts]:
    """Returns what continues `rows` prompts of a loaded run, and their texts; see `generate` for `show`."""
    vocabulary, eos_ids = loaded.vocabulary_or_none, decoding.eos_ids
    if vocabulary is None and decoding.stops:
        raise LoadError("--stop needs texts: set VOCABULARY, or use --eos_id.")
    texts = Texts(
        None if vocabulary is None else decoder_of(vocabulary),
        ends=loaded.eos_ids if eos_ids is None else eos_ids,
        stops=decoding.stops,
        show=show,
    )
    decoder = decoder_for(
        loaded,
        decoding.settings,
        eos_ids=eos_ids,
        policy=FullCache() if decoding.policy is None else decoding.policy,
        batch_size=loaded.batch_size(decoding.batch_size, rows),
        cache_dtype=decoding.cache_dtype,
        prefill_chunk=decoding.prefill_chunk,
        watch=texts.watch if texts.watching else None,
        watch_every=LOOK_AT_STOPS if show is None else LOOK_AT_STREAM,
    )
    return decoder, texts


def decoder_for(
    loaded: LoadedRun,
    settings: Settings,
    *,
    eos_ids: Sequence[int] | None = None,
    made: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Returns made(model, parameters, settings, ...) of a loaded run, by default its `Decoder`; see `generate` for `eos_ids`."""
    vocabulary = loaded.vocabulary_or_none
    settings = dataclasses.replace(
        settings,
        eos_ids=tuple(loaded.eos_ids if eos_ids is None else eos_ids),
        num_ids=vocabulary.vocab_size if vocabulary else loaded.model.config.vocab_size,
    )
    return (made or Decoder)(
        loaded.model,
        loaded.params,
        settings,
        decoder_start=loaded.start_token or 0,
        sharding=loaded.row_sharding,
        **options,
    )


def _costs(stats: Stats, policy_name: str, cache_dtype: str | None) -> str:
    cache = policy_name if cache_dtype is None else f"{policy_name}, {cache_dtype}"
    return (
        f"{stats.new_tokens:,} new tokens, {stats.tokens_per_second:,.1f} tokens/s (prefill of "
        f"{stats.prompt_tokens:,} tokens {stats.prefill_seconds:.2f} s, decoding "
        f"{stats.decode_seconds:.2f} s, compilation before {stats.compile_seconds:.1f} s); cache "
        f"({cache}) {stats.cache_bytes:,} bytes a batch"
    )
