"""`generate_until` of launch/lm_eval/model.py: parses the harness's generation options, and generates."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.launch.inference.texts import Texts, decoder_of
from espalier.launch.run.load_run import LoadedRun, LoadError
from espalier.model.kv_cache.base import CachePolicy
from espalier.trainers.decoding.buckets import bucket_length
from espalier.trainers.decoding.decoder import Decoder, check_options
from espalier.trainers.decoding.settings import Sampling, Settings

OPTIONS = (
    *("until", "max_gen_toks", "do_sample", "temperature"),
    *("top_k", "top_p", "min_p", "repetition_penalty"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Options of one kind of request.

    Attributes:
      until: an answer ends before any of these texts, or at EOS.
      max_gen_toks: maximum number of new tokens.
      sampling: sampling settings.
    """

    until: tuple[str, ...]
    max_gen_toks: int
    sampling: Sampling


def options(
    gen_kwargs: Mapping[str, Any], *, max_gen_toks: int, model_defaults: Mapping[str, Any]
) -> Generation:
    """Returns the options in a request's `gen_kwargs`, parsed like in the harness's own backends.

    Args:
      gen_kwargs: options of the task, or of the flag --gen_kwargs.
      max_gen_toks: its default.
      model_defaults: the model's generation_config.json. Its repetition penalty applies to all
        requests, its sampling settings to requests that sample.

    Raises:
      LoadError: an option that is not in OPTIONS, or a value out of range.
    """
    from lm_eval.models import utils

    values = utils.normalize_gen_kwargs(dict(gen_kwargs), max_gen_toks)
    if values.get("num_beams") == 1:
        del values["num_beams"]
    if unknown := sorted(set(values) - set(OPTIONS)):
        raise LoadError(
            f"gen_kwargs: {', '.join(unknown)} is not supported. Valid options: {', '.join(OPTIONS)}."
        )
    wanted = {**model_defaults, **values}
    sampling: dict[str, Any] = {"temperature": 0.0}
    if values["do_sample"]:
        sampling["temperature"] = float(values.get("temperature", 1.0))
        given = wanted if sampling["temperature"] else values  # the model's settings are of draws
        sampling |= {
            name: given[name] for name in ("top_p", "min_p") if given.get(name) is not None
        }
        sampling["top_k"] = given.get("top_k") or None  # 0 means all tokens, as in transformers
    sampling["repetition_penalty"] = float(wanted.get("repetition_penalty") or 1.0)
    try:
        chosen = Sampling(**sampling)
    except ValueError as error:
        raise LoadError(f"gen_kwargs: {error}") from None
    if values["max_gen_toks"] < 1:
        raise LoadError(f"gen_kwargs: max_gen_toks={values['max_gen_toks']} must be at least 1.")
    until = utils.handle_stop_sequences(values["until"], eos=None)
    return Generation(
        until=tuple(stop for stop in until if stop),
        max_gen_toks=values["max_gen_toks"],
        sampling=chosen,
    )


class Generator:
    """Continues contexts; caches the compiled programs of the last used options.

    Args:
      run: the model.
      ends: ids that end an answer.
      batch_tokens: tokens of a batch, including new tokens.
      batch_size: maximum rows; None for as many as batch_tokens allows.
      policy, cache_dtype, prefill_chunk: see trainers/decoding/decoder.py.
      seed: seed of sampling.
    """

    def __init__(
        self,
        run: LoadedRun,
        *,
        ends: Sequence[int],
        batch_tokens: int,
        batch_size: int | None = None,
        policy: CachePolicy,
        cache_dtype: str | None = None,
        prefill_chunk: int | None = None,
        seed: int = 0,
    ):
        check_options(run.model, policy=policy, prefill_chunk=prefill_chunk)
        self._run, self._ends, self._seed = run, tuple(ends), seed
        self._batch_tokens, self._batch_size = batch_tokens, batch_size
        self._options: dict[str, Any] = {
            "policy": policy,
            "cache_dtype": cache_dtype,
            "prefill_chunk": prefill_chunk,
        }
        self._decoder: tuple[Any, Decoder] | None = None

    def use(self, run: LoadedRun) -> None:
        """Sets another run of an equal model, for which all programs stay."""
        self._run = run
        if self._decoder is not None:
            self._decoder[1].use(run.params)

    def stream(self, contexts: Sequence[Sequence[int]], chosen: Generation) -> Iterator[str]:
        """Yields the answers to contexts with the same options, in order, as they finish."""
        longest = max(map(len, contexts))
        most = max(1, self._batch_tokens // (bucket_length(longest) + chosen.max_gen_toks))
        most = min(most, self._batch_size or most)
        # As few batches as possible, of equal size, so that the last one has little padding.
        batches = -(-len(contexts) // most)
        rows = -(-len(contexts) // batches)
        decoder = self._decoder_for(chosen, self._run.batch_size(rows, len(contexts)))
        vocabulary, watched = self._run.vocabulary, {}
        decode = decoder_of(vocabulary)
        if hasattr(vocabulary, "decode_all"):
            # `until` may have special tokens, which answers do not contain.
            watched = {"decode_watched": vocabulary.decode_all}
            decode = functools.partial(vocabulary.decode_all, skip_special_tokens=True)
        self._texts = Texts(decode, ends=self._ends, stops=chosen.until, **watched)
        for new in decoder.stream(contexts, seed=self._seed % 2**32):
            yield self._texts.text(new.tokens)[0]

    def _decoder_for(self, chosen: Generation, rows: int) -> Decoder:
        settings = Settings(
            max_new_tokens=chosen.max_gen_toks,
            sampling=chosen.sampling,
            eos_ids=self._ends,
            num_ids=self._run.vocabulary.vocab_size,
        )
        key = (settings, rows)
        if self._decoder is None or self._decoder[0] != key:
            self._decoder = None  # frees its copy of the parameters first
            decoder = Decoder(
                self._run.model,
                self._run.params,
                settings,
                decoder_start=self._run.start_token or 0,
                batch_size=rows,
                sharding=self._run.row_sharding,
                watch=lambda *new: self._texts.watch(*new),
                **self._options,
            )
            self._decoder = (key, decoder)
        return self._decoder[1]
