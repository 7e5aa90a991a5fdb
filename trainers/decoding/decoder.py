"""Generates continuations of prompts: batches, compiled programs and their cost.

Shapes: B prompts, R rows (B times the samples or beams of each), T prompt length, M new tokens at most.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from espalier.common import stages
from espalier.common.bars import Bar
from espalier.model import rows
from espalier.model.kv_cache.base import CachePolicy
from espalier.model.kv_cache.full import FullCache
from espalier.model.transforms import layer_stack
from espalier.trainers.decoding import beam
from espalier.trainers.decoding.buckets import (
    batches_by_length,
    bucket_length,
    grouped,
    in_order,
    padded,
    program_tokens,
    stacked,
)
from espalier.trainers.decoding.decode import Settings, advance, begin
from espalier.trainers.decoding.prefill import check_memory, prefill, repeated
from espalier.trainers.decoding.sampling import seen_in
from espalier.trainers.decoding.stop_strings import Watch, Watched


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """One continuation of a prompt.

    Attributes:
      tokens: token ids, including EOS.
      log_probs: the model's log-probability of each token.
      score: for a beam, its summed (penalised) log-probability divided by length^length_penalty.
    """

    tokens: list[int]
    log_probs: list[float]
    score: float | None = None


def check_options(model: Any, *, policy: CachePolicy | None, prefill_chunk: int | None) -> None:
    """Raises ValueError for options of `Decoder` that would have no effect on an encoder-decoder."""
    if not model.row.encodes:
        return
    if prefill_chunk is not None:
        raise ValueError("An encoder-decoder reads its inputs whole: remove prefill_chunk.")
    if policy is not None and type(policy) is not FullCache:
        raise ValueError(
            f"An encoder-decoder attends to all of its inputs, of which a cache policy selects none: remove cache_policy "
            f"({type(policy).__name__})."
        )


@dataclasses.dataclass
class Stats:
    """Cost of generation, in tokens, seconds without compilation, and bytes of the largest batch's caches."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    cache_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """The number of new tokens per second of prefill and decoding."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.new_tokens / seconds if seconds else 0.0


class Decoder:
    """Continues prompts in batches of similar length; compiles once for each of a few lengths.

    Batches of another length get programs of their own only if these save more padding than they cost
    (trainers/decoding/buckets.py).

    A continuation depends on the seed, the index of its prompt and the number of the sample, not on its batch.

    Args:
      model: a language model, layers scanned or unrolled. An encoder-decoder reads the prompts as its inputs, and continues
        `decoder_start`.
      decoder_start: the token that the targets of an encoder-decoder follow.
      sharding: sharding of a batch's rows; calls must be within its mesh. None on one device.
      policy: policy of the key/value caches; None to cache all tokens, as an encoder-decoder does.
      cache_dtype: dtype of the caches while decoding, see `prefill`; None for the model's.
      prefill_chunk: number of prompt tokens to read at a time; None for all. Not with encoder-decoders.
      watch: called with the new tokens of every row, and can end the row; None does not end rows. Not
        supported with beams, whose tokens are not final before the end.
      watch_every: number of new tokens between two calls of `watch`.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        settings: Settings,
        *,
        decoder_start: int = 0,
        policy: CachePolicy | None = None,
        batch_size: int = 8,
        sharding: NamedSharding | None = None,
        cache_dtype: Any = None,
        prefill_chunk: int | None = None,
        watch: Watch | None = None,
        watch_every: int = 16,
    ):
        if watch is not None and settings.beams is not None:
            raise ValueError(
                "A watch is not supported with beams: they are not final before the end."
            )
        self.model = model
        check_options(model, policy=policy, prefill_chunk=prefill_chunk)
        config = model.config
        # Slices of stacked weights inside the loop would copy them for every token.
        self._model = layer_stack.unrolled(model)
        # Several decoders of unrolled parameters share them.
        unroll = jax.jit(lambda params: layer_stack.unroll(params, config))
        self._unroll = unroll if config.scan_layers else lambda params: params
        self.use(params)
        self._settings = settings
        self._decoder_start = decoder_start
        self._policy = FullCache() if policy is None else policy
        self._batch_size = batch_size
        self._sharding = sharding
        self._prefill_options = {"cache_dtype": cache_dtype, "chunk": prefill_chunk}
        self._watch = watch
        self._watch_every = watch_every
        self._programs: dict[tuple[str, int], Callable] = {}
        self._batches_read: collections.Counter[int] = collections.Counter()  # by length
        self._indices: Sequence[int] = ()
        self._first: Sequence[Sequence[int] | None] | None = None
        self._columns: Sequence[Mapping[str, np.ndarray]] = ()
        self.stats = Stats()

    def use(self, params: Any) -> None:
        """Sets other parameters of the same shapes, for which all programs stay."""
        self._params: Any = None  # frees its copy first
        self._params = self._unroll(params)

    def __call__(self, prompts: Sequence[Sequence[int]], *, seed: int = 0) -> list[Continuation]:
        """Returns continuations in the order of the prompts; raises the errors of `stream`."""
        return list(self.stream(prompts, seed=seed))

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        first: Sequence[Sequence[int] | None] | None = None,
        columns: Sequence[Mapping[str, np.ndarray]] = (),
    ) -> Iterator[Continuation]:
        """Yields continuations as they are finished, in the order of the prompts and their samples.

        Args:
          indices: indices of the prompts in a larger set, for the draws; None for 0, 1, ...
          first: the tokens among which each prompt's first new token is chosen, None for all; None if no prompt has any.
          columns: what layers read of each prompt's row besides its tokens, see `trainers.scoring.scoring.Row`; empty for
            nothing.

        Raises:
          ValueError: a prompt is empty, has no token before the last `policy.future` tokens, or leaves
            no room for new tokens within the learned positions.
        """
        limit = self._model.max_length
        room = self._settings.max_new_tokens - 1  # the last new token is never read
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"Prompt {i} is empty: there is nothing to continue.")
            if len(prompt) <= self._policy.future:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens; the cache policy reads the last {self._policy.future} as the "
                    "continuation, so nothing is left to continue: give a longer prompt."
                )
            if limit is not None and len(prompt) + room > limit:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens; with {room + 1} new ones it is longer than "
                    f"the {limit} positions that the model has learned. Lower max_new_tokens."
                )
        self._indices = range(len(prompts)) if indices is None else indices
        self._first = first
        self._columns = columns
        batches = self._batches(prompts, seed)
        return (continuation for samples in in_order(batches) for continuation in samples)

    def _batches(
        self, prompts: Sequence[Sequence[int]], seed: int
    ) -> Iterator[tuple[int, list[Continuation]]]:
        """Yields (index, continuations) of each prompt, batch by batch."""
        lengths = [len(prompt) for prompt in prompts]
        batches = batches_by_length(lengths, self._batch_size)
        limit = self._model.max_length
        buckets = [bucket_length(lengths[batch[0]], limit=limit) for batch in batches]
        padded_lengths = self._padded_lengths(buckets)
        quiet = True if len(batches) == 1 else None
        with Bar(batches, desc="generate", unit="batch", disable=quiet or None) as progress:
            for batch, bucket in zip(progress, buckets, strict=True):
                continued = self._batch(prompts, batch, padded_lengths[bucket], seed)
                progress.set_postfix_str(f"{self.stats.tokens_per_second:,.0f} tokens/s")
                yield from zip(batch, continued, strict=True)

    def _padded_lengths(self, buckets: Sequence[int]) -> dict[int, int]:
        """Returns the length of the programs that read batches of each length, from the lengths of all batches."""
        known = {length for _, length in self._programs}
        # With the batches of earlier calls, many small calls get the programs that a large one gets.
        self._batches_read.update(buckets)
        counts = [(length, self._batches_read[length]) for length in dict.fromkeys(buckets)]

        def program(group: tuple[int, int]) -> tuple[float, int]:
            """Returns (cost in tokens, length of the cheapest program) of a number of batches up to a length."""
            length, count = group
            rows = count * self._batch_size
            # A prompt is read by one program and continued by another.
            options = [(rows * length + 2 * self._program_tokens, length)]
            return min(options + [(rows * other, other) for other in known if other >= length])

        groups = grouped(
            counts,
            lambda one, other: (max(one[0], other[0]), one[1] + other[1]),
            lambda group: program(group)[0],
        )
        return {length: program(group)[1] for group, members in groups for length, _ in members}

    @functools.cached_property
    def _program_tokens(self) -> float:
        return program_tokens(self._model, self._params)

    def _batch(
        self, prompts: Sequence[Sequence[int]], batch: Sequence[int], length: int, seed: int
    ) -> list[list[Continuation]]:
        tokens_BT, lengths_B = padded([prompts[i] for i in batch], self._batch_size, length)
        active_B = np.arange(self._batch_size) < len(batch)
        allowed_BV = self._allowed(batch)
        more = stacked([self._columns[i] for i in batch] if self._columns else [], self._batch_size)
        index_B = np.zeros(self._batch_size, np.uint32)
        index_B[: len(batch)] = [self._indices[i] for i in batch]
        seed_B = np.full_like(index_B, seed)
        arrays = (tokens_BT, lengths_B, active_B, allowed_BV, (seed_B, index_B), more)
        state = self._read(length, *jax.device_put(arrays, self._sharding))
        decode = self._choose if self._settings.beams is None else self._search
        continued = decode(length, state, batch)
        self.stats.prompt_tokens += sum(len(prompts[i]) for i in batch)
        self.stats.new_tokens += sum(len(row.tokens) for rows in continued for row in rows)
        return continued

    def _allowed(self, batch: Sequence[int]) -> np.ndarray | None:
        """Returns the tokens that may be first in each row, [B, V]; None for all tokens in all batches."""
        if self._first is None:
            return None
        allowed_BV = np.ones((self._batch_size, self._model.config.vocab_size), bool)
        for b, i in enumerate(batch):
            if (ids := self._first[i]) is not None:
                allowed_BV[b] = False
                allowed_BV[b, list(ids)] = True
        return allowed_BV

    def _name(self, program: str) -> str:
        """Returns the name of a program, which differs if rows have columns."""
        return f"{program} with columns" if self._columns else program

    def _read(self, length: int, *arrays: Any) -> Any:
        """Reads each prompt once and repeats its caches.

        Returns:
          A decode.Loop or beam.search's arguments, and the context of the rows (see model/rows.py).
        """
        model, policy, settings = self._model, self._policy, self._settings
        room = max(settings.max_new_tokens - 1, 1)
        beams, penalty = settings.beams, settings.sampling.repetition_penalty
        copies = settings.num_samples if beams is None else beams.num_beams
        start, options = self._decoder_start, self._prefill_options

        def run(params, tokens_BT, lengths_B, active_B, allowed_BV, drawn_B, more):
            columns, tokens_BT, lengths_B = model.row.prompts(tokens_BT, lengths_B, start=start)
            context = model.row_context({"params": params}, {**columns, **more})
            with rows.given(context):
                logits_BV, caches = prefill(
                    *(model, params, policy, tokens_BT, lengths_B),
                    room=room,
                    encoder=rows.encoder_arguments(columns),
                    **options,
                )
            lengths_B = lengths_B - policy.future  # where decoding starts
            seen_BV = None if penalty == 1 else seen_in(tokens_BT, lengths_B, logits_BV.shape[-1])
            caches, context = repeated((caches, context), copies)
            if beams is not None:
                return (logits_BV, caches, lengths_B, active_B, seen_BV, allowed_BV), context
            copy_R = jnp.tile(jnp.arange(copies, dtype=jnp.uint32), len(lengths_B))
            all_B = (logits_BV, lengths_B, active_B, seen_BV, allowed_BV, drawn_B)
            all_R = repeated(all_B, copies)
            logits_RV, lengths_R, active_R, seen_RV, allowed_RV, (seed_R, index_R) = all_R
            keys_R = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seed_R), index_R)
            keys_R = jax.vmap(jax.random.fold_in)(keys_R, copy_R)
            own_R = (lengths_R, active_R, keys_R, seen_RV)
            return begin(logits_RV, caches, *own_R, settings, allowed_RV), context

        name = self._name("prefill" if self._first is None else "restricted prefill")
        program = self._compiled(name, length, jax.jit(run), *arrays)
        began = time.perf_counter()
        state = jax.block_until_ready(program(self._params, *arrays))
        self.stats.prefill_seconds += time.perf_counter() - began
        caches = state[0].caches if beams is None else state[0][1]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
        self.stats.cache_bytes = max(self.stats.cache_bytes, size)
        return state

    def _choose(self, length: int, state: Any, batch: Sequence[int]) -> list[list[Continuation]]:
        """Returns the continuations of a batch, with tokens chosen one by one."""
        model, policy, settings = self._model, self._policy, self._settings

        def run(params, state, until, ended_R):
            loop, context = state
            with rows.given(context):
                loop = advance(model, params, policy, loop, until, ended_R, settings)
            return (loop, context), (loop.done_B, loop.decoded)

        def advanced(state, until):
            arrays = (np.int32(until), jax.device_put(ended_R, self._sharding))
            return self._timed(self._name("decode"), length, run, state, *arrays)

        samples = settings.num_samples
        watched = Watched(self._watch, batch, samples)
        ended_R = np.zeros(self._batch_size * samples, bool)
        continued: dict[int, Continuation] = {}
        every = settings.max_new_tokens if self._watch is None else self._watch_every
        until, loop = 1, state[0]  # reading the prompt has chosen the first token
        if loop.done_B.is_fully_addressable:
            done_R, decoded = jax.device_get((loop.done_B, loop.decoded))
        else:
            state, (done_R, decoded) = advanced(state, until)
        while True:
            counts_R = decoded.lengths_B
            ended_R = watched.look(decoded.tokens_BM, counts_R)
            last = until == settings.max_new_tokens or np.all(done_R | ended_R)
            for r in range(len(batch) * samples):
                if r in continued or not (last or done_R[r] or ended_R[r]):
                    continue
                n = watched.lengths.get(r, int(counts_R[r]))
                tokens, log_probs = decoded.tokens_BM[r, :n], decoded.log_probs_BM[r, :n]
                continued[r] = Continuation(tokens=tokens.tolist(), log_probs=log_probs.tolist())
            if last:
                break
            until = min(until + every, settings.max_new_tokens)
            state, (done_R, decoded) = advanced(state, until)
        return [[continued[b * samples + g] for g in range(samples)] for b in range(len(batch))]

    def _search(self, length: int, state: Any, batch: Sequence[int]) -> list[list[Continuation]]:
        """Returns the continuations of a batch by beam search."""
        model, policy, settings = self._model, self._policy, self._settings

        def run(params, state):
            (logits_BV, caches, lengths_B, active_B, seen_BV, allowed_BV), context = state
            own_B = (lengths_B, active_B, seen_BV)
            with rows.given(context):
                beams, caches = beam.search(
                    model, params, policy, logits_BV, caches, *own_B, settings, allowed_BV
                )
            return ((logits_BV, caches, *own_B, allowed_BV), context), beams

        name = self._name("decode" if self._first is None else "restricted decode")
        _, beams = self._timed(name, length, run, state)
        return [
            [
                Continuation(
                    tokens=beams.tokens_BKM[b, k, : beams.lengths_BK[b, k]].tolist(),
                    log_probs=beams.log_probs_BKM[b, k, : beams.lengths_BK[b, k]].tolist(),
                    score=float(beams.scores_BK[b, k]),
                )
                for k in range(settings.num_samples)
            ]
            for b in range(len(batch))
        ]

    def _timed(self, name: str, length: int, run: Callable, state: Any, *arrays: Any) -> Any:
        """Runs `run`: (params, state, *arrays) -> (state, result), and fetches the result to every process.

        The state is donated, and its sharding does not change.
        """
        shardings = None
        if self._sharding is not None:
            unchanged = jax.tree.map(lambda x: x.sharding, state)
            shardings = (unchanged, NamedSharding(self._sharding.mesh, PartitionSpec()))
        jitted = jax.jit(run, donate_argnums=1, out_shardings=shardings)
        program = self._compiled(name, length, jitted, state, *arrays)
        began = time.perf_counter()
        state, result = program(self._params, state, *arrays)
        result = jax.device_get(result)
        self.stats.decode_seconds += time.perf_counter() - began
        return state, result

    def _compiled(self, name: str, length: int, function: Any, *arrays: Any) -> Callable:
        """Returns the program for prompts of a length; compiling or loading it is timed separately.

        Raises:
          TooLargeError: its results cannot be in memory.
        """
        if (name, length) not in self._programs:
            began = time.perf_counter()
            check = functools.partial(
                check_memory,
                what=f"max_new_tokens = {self._settings.max_new_tokens:,} for {self._batch_size:,} rows at a time",
                remedy="lower max_new_tokens, batch_size or the number of samples, or choose a cache policy with a capacity",
                devices=1 if self._sharding is None else self._sharding.mesh.size,
            )
            with stages.stage(f"compiling {name} for {length} tokens"):
                traced = function.trace(self._params, *arrays)
                check(traced.out_info)
                program = traced.lower().compile()
            self._programs[name, length] = program
            self.stats.compile_seconds += time.perf_counter() - began
        return self._programs[name, length]
