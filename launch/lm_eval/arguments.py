"""What lm-evaluation-harness says about a run's model: --model_args, and the options of `generate_until`, which is here too.

launch/lm_eval/model.py is the model.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from espalier.common import spelling
from espalier.launch.inference.generate import decoder_for
from espalier.launch.inference.texts import Texts, decoder_of
from espalier.launch.load import load_run
from espalier.launch.load.load_run import LoadedRun, LoadError, RunConfig
from espalier.model.kernels.platform import target_platform
from espalier.model.kv_cache.base import CachePolicy
from espalier.model.kv_cache.policies import policy_from_text
from espalier.trainers.decoding.buckets import bucket_length
from espalier.trainers.decoding.decoder import Decoder, check_options
from espalier.trainers.decoding.settings import Sampling, Settings

_LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")  # in the harness's order
_MAX_LENGTH = 2048  # if the model has no maximum length, as in the harness
_DTYPES = ("float32", "bfloat16", "float16")
OPTIONS = (
    *("until", "max_gen_toks", "do_sample", "temperature"),
    *("top_k", "top_p", "min_p", "repetition_penalty"),
)
_CACHE = "cache_"  # prefix of the policy's settings in model_args


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments of --model_args.

    Attributes:
      checkpoint: run or step directory.
      params: see launch/load/load_run.py.
      adapter: run or step directory of adapters of this checkpoint; None for none.
      gin_file: configuration of a step directory without a config.gin.
      dtype: dtype of computation; None for the dtype of the run or checkpoint.
      mesh: mesh shape, as {'fsdp': 8}; None for all devices.
      start_token: token before every context; 'auto' for the run's start token.
      add_bos_token: whether texts begin with BOS; None for the run's setting.
      prefix_token_id: the token of an empty context; None for the start token, else BOS, else EOS.
      chat_template: a jinja file or a name in data/tokenizers/chat_template.py; None for the tokenizer's own.
      max_length: maximum tokens of an input; None for the model's learned or published length, else 2048.
      cut: where contexts of generation lose tokens that exceed max_length less the new tokens: 'beginning' or 'middle'.
      max_gen_toks: maximum new tokens, for tasks that do not set it.
      batch_tokens: tokens of a batch, including padding; None for 2048 on CPU (8192 when it generates), 16384 elsewhere.
      batch_size: maximum rows of a batch; 1 (the harness's value without --batch_size) and 'auto' mean as many as
        batch_tokens allows.
      max_batch_size: a second limit of rows; None for no limit.
      cache_policy: cache policy of generation, see `espalier generate --help`; its settings are cache_NAME,
        such as cache_capacity=1024.
      cache_dtype, prefill_chunk: see `espalier generate --help`.
      seed: seed of requests that sample.
      device: ignored: JAX chooses the device (JAX_PLATFORMS).
    """

    checkpoint: str
    params: str = "auto"
    adapter: str | None = None
    gin_file: str | None = None
    dtype: str | None = None
    mesh: Mapping[str, int] | None = None
    start_token: int | Literal["auto"] | None = "auto"
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    chat_template: str | None = None
    max_length: int | None = None
    cut: str = "beginning"
    max_gen_toks: int = 256
    batch_tokens: int | None = None
    batch_size: int | str | None = None
    max_batch_size: int | None = None
    cache_policy: str = "full"
    cache_dtype: str | None = None
    prefill_chunk: int | None = None
    seed: int = 0
    device: str | None = None

    def __post_init__(self):
        if self.checkpoint is None:
            raise LoadError("--model_args: give checkpoint=DIR, a run or step directory.")
        if self.params not in load_run.PARAMS:
            raise LoadError(
                f"--model_args: params={self.params} must be one of {', '.join(load_run.PARAMS)}."
            )

        if not isinstance(self.mesh, Mapping | None):
            raise LoadError(f"--model_args: mesh={self.mesh} must be like {{'fsdp':8}}.")

    def configuration(self) -> Any:
        """Returns the configuration of the run, whose entry makes a `RunConfig`."""
        return load_run.configuration_of(self.checkpoint, [self.gin_file] if self.gin_file else [])

    def changed(self, config: RunConfig) -> RunConfig:
        """Returns a configuration with the changes of these arguments."""
        changes: dict[str, Any] = {"mesh": self.mesh, "add_bos": self.add_bos_token}
        changes["chat_template"] = self.chat_template
        changes = {name: value for name, value in changes.items() if value is not None}
        if self.start_token != "auto":
            changes["start_token"] = self.start_token
        if self.dtype is not None:
            changes["model"] = computing_in(self.dtype, config.model)
        return dataclasses.replace(config, **changes)


def parsed(**given: Any) -> tuple[Arguments, CachePolicy]:
    """Returns the arguments, and the cache policy with its settings; raises LoadError for unknown ones."""
    names = [field.name for field in dataclasses.fields(Arguments)]
    own = Arguments(**{name: value for name, value in given.items() if name in names})
    others = {name: value for name, value in given.items() if name not in names}
    policy = policy_from_text(own.cache_policy, policy_settings(others, known=names))
    if policy.future:
        raise LoadError(
            f"--model_args: cache_policy={own.cache_policy} needs the answer beforehand; choose another."
        )
    return own, policy


def default_batch_tokens() -> int:
    # Few tokens saturate a CPU, and small batches have less padding.
    return 2048 if target_platform() == "cpu" else 16384


def default_generation_tokens() -> int:
    # A CPU reads all weights for each new token of a batch, which a larger batch shares.
    return 8192 if target_platform() == "cpu" else 16384


def computing_in(dtype: str, model: Any) -> Any:
    if dtype not in _DTYPES:
        raise LoadError(f"--model_args: dtype={dtype} must be one of {', '.join(_DTYPES)}.")
    return model.clone(config=dataclasses.replace(model.config, dtype=dtype))


def policy_settings(others: Mapping[str, Any], *, known: Iterable[str]) -> dict[str, str]:
    """Returns the settings of the cache policy among the unknown arguments `others`; raises LoadError for any other."""
    if unknown := [name for name in others if not name.startswith(_CACHE)]:
        raise LoadError(
            f"--model_args: there is no {unknown[0]!r} ({spelling.nearest(unknown[0], known)}). "
            f"Arguments: {', '.join(known)}, and {_CACHE}NAME for the settings of the cache policy."
        )
    return {name.removeprefix(_CACHE): str(value) for name, value in others.items()}


def max_length(run: LoadedRun, length: int | None) -> int:
    """Returns the maximum length of inputs; `length` is the argument of --model_args."""
    learned = run.model.max_length
    if length is None:
        published = run.meta.get("hf", {}).get("config", {})
        known = (published[key] for key in _LENGTH_KEYS if key in published)
        return next(known, _MAX_LENGTH) if learned is None else learned
    if length < 1 or (learned is not None and length > learned):
        limit = f" and at most the model's {learned} positions" if learned else ""
        raise LoadError(f"--model_args: max_length={length} must be at least 1{limit}.")
    return length


def cut_of(place: str) -> Callable[[list[int], int], list[int]]:
    """Returns a function (tokens, room) -> at most `room` tokens, without those at the place that --model_args names."""
    cuts: dict[str, Callable[[list[int], int], list[int]]] = {
        "beginning": lambda tokens, room: tokens[-room:],
        "middle": _without_middle,
    }
    if place not in cuts:
        raise LoadError(f"--model_args: cut={place} must be one of {', '.join(cuts)}.")
    return cuts[place]


def _without_middle(tokens: list[int], room: int) -> list[int]:
    if len(tokens) <= room:
        return tokens
    end = room // 2
    return tokens[: room - end] + (tokens[-end:] if end else [])


def max_rows(batch_size: int | str | None, limit: int | None) -> int | None:
    """Returns the maximum rows of a batch; None for as many as its tokens allow."""
    if batch_size is None or str(batch_size).startswith("auto") or str(batch_size) == "1":
        return limit
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise LoadError(f"--batch_size={batch_size} must be at least 1, or auto.")
    return int(batch_size) if limit is None else min(int(batch_size), limit)


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
      seed: random seed of sampling.
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
        settings = Settings(max_new_tokens=chosen.max_gen_toks, sampling=chosen.sampling)
        key = (settings, rows)
        if self._decoder is None or self._decoder[0] != key:
            self._decoder = None  # frees its copy of the parameters first
            decoder = decoder_for(
                self._run,
                settings,
                eos_ids=self._ends,
                batch_size=rows,
                watch=lambda *new: self._texts.watch(*new),
                **self._options,
            )
            self._decoder = (key, decoder)
        return self._decoder[1]
