"""A batch that does not end: rows join it and leave it while the others are continued (continuous batching).

A new prompt is read by itself, some tokens at a time, between which the others go on. Its keys and values then take a free
row. All rows write to the same slot, which moves on in a ring (model/kv_cache/slots.py), so a row joins with its last token
just before that slot, and needs no more slots than it has tokens. The ring has one of a few lengths, and the batch one of a
few sizes, so there are few programs, whatever joins and leaves.

Shapes: R rows, P rows in which one prompt is read, T tokens read at a time, C new tokens at a time, V vocabulary.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from espalier.model import rows
from espalier.model.kv_cache import slots
from espalier.model.kv_cache.base import CachePolicy
from espalier.model.kv_cache.full import FullCache
from espalier.model.kv_cache.slots import Slots, carried, restored
from espalier.model.transforms import layer_stack
from espalier.trainers.decoding.buckets import SMALLEST, bucket_length
from espalier.trainers.decoding.decode import choose
from espalier.trainers.decoding.prefill import (
    TooLargeError,
    check_memory,
    empty_caches,
    prefill,
    read,
)
from espalier.trainers.decoding.prefixes import Prefixes
from espalier.trainers.decoding.sampling import RowSampling
from espalier.trainers.decoding.settings import Draw, Settings

READ_AT_ONCE = 256  # tokens of a prompt between which others are continued
PREFIX_BYTES = 1_000_000_000
_SHORTEST = 64  # slots of the smallest program


@flax.struct.dataclass
class _Rows:
    """The state between steps; a row without a request is done.

    Attributes:
      token_R, position_R: the last chosen token, which is not yet in the caches, and its position.
      chosen_R, left_R: number of tokens that were chosen, and that may still be.
      key_R2: data of each row's random key.
      caches: `Slots` as rings, and what was read of an encoder's output.
      context: see model/rows.py.
    """

    token_R: jax.Array
    position_R: jax.Array
    chosen_R: jax.Array
    left_R: jax.Array
    done_R: jax.Array
    key_R2: jax.Array
    sampling: RowSampling
    caches: Any
    context: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class News:
    """The new tokens of a row, the model's log-probability of each, and whether the row has ended and left."""

    tokens: Sequence[int]
    log_probs: Sequence[float]
    ended: bool


class RunningBatch:
    """Continues rows that join and leave; greedy tokens and draws of a row are those of the row in a batch of its own.

    Args:
      model: a language model, layers scanned or unrolled. An encoder-decoder reads prompts as its inputs, each whole.
      settings: `eos_ids` and `num_ids` are used; `join` has each row's own draw and number of tokens.
      sizes: numbers of rows that the batch may have, ascending; a prompt is read in the first.
      longest: maximum number of tokens of a prompt and its continuation together.
      decoder_start, sharding, cache_dtype: see `Decoder`.
      policy: None or `FullCache`.
      prefill_chunk: tokens of a prompt that are read at a time; None for READ_AT_ONCE.
      prefix_bytes: bytes for keys and values of earlier prompts, so that what a prompt begins with is not read again; 0 for
        none. None for PREFIX_BYTES, or for none of an encoder-decoder.
      most_steps: maximum of new tokens of a row in one `advance`.

    Raises:
      ValueError: another policy, settings that are each row's own, or an option that an encoder-decoder cannot obey.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        settings: Settings,
        *,
        sizes: Sequence[int],
        longest: int,
        decoder_start: int = 0,
        sharding: NamedSharding | None = None,
        cache_dtype: Any = None,
        policy: CachePolicy | None = None,
        prefill_chunk: int | None = None,
        prefix_bytes: int | None = None,
        most_steps: int = 16,
    ):
        if policy is not None and type(policy) is not FullCache:
            raise ValueError(
                f"The cache policy {type(policy).__name__} compresses each prompt for itself, and rows that join others keep "
                "all tokens: remove cache_policy."
            )
        defaults = Settings()
        for name in ("sampling", "num_samples", "beams"):
            if getattr(settings, name) != getattr(defaults, name):
                raise ValueError(
                    f"Settings.{name} has no effect where rows join a batch, since each has its own draw: remove it."
                )
        if model.row.encodes and (prefix_bytes or prefill_chunk is not None):
            raise ValueError(
                "An encoder reads each prompt whole, and all of its tokens see one another: remove prefix_cache_bytes and "
                "prefill_chunk."
            )
        if prefix_bytes is None:
            prefix_bytes = 0 if model.row.encodes else PREFIX_BYTES
        if prefix_bytes < 0 or (prefill_chunk is not None and prefill_chunk < 1):
            raise ValueError(
                f"prefix_cache_bytes = {prefix_bytes} must be at least 0, and prefill_chunk = {prefill_chunk} at least 1."
            )
        self._model = layer_stack.unrolled(model)
        self._params = layer_stack.unroll(params, model.config)
        self._settings, self._sizes, self._longest = settings, sizes, longest
        self._start, self._sharding, self._dtype = decoder_start, sharding, cache_dtype
        self._policy, self._chunk = FullCache(), prefill_chunk or READ_AT_ONCE
        self._most_steps, self._prefix_bytes = most_steps, prefix_bytes
        self.prefixes = Prefixes(prefix_bytes)
        self._rows: _Rows | None = None
        self._slots = 0
        self._reading: Any = None  # shapes of the prompt that is read, which then needs a row
        self._shapes: dict[int, Any] = {}  # of the slots in which a prompt is read, by their number
        self._keys: list[Hashable | None] = []  # whose each row is
        self._needs: dict[Hashable, int] = {}  # slots of each
        self._programs: dict[str, Any] = {
            "read": jax.jit(self._read_tokens, donate_argnums=4),
            "read inputs": jax.jit(self._read_inputs),
            "take prefix": jax.jit(_beginning, static_argnums=2),
            "make row": jax.jit(self._row, static_argnums=0),
            "make": jax.jit(self._made, static_argnums=(0, 1)),
            "resize": jax.jit(self._resized, static_argnums=(2, 3)),
            "join": jax.jit(self._joined, donate_argnums=0),
            "advance": jax.jit(self._advanced, donate_argnums=1),
        }
        self.prompt_tokens_read = 0

    @property
    def most_bytes(self) -> tuple[int, int, int]:
        """The maximum bytes of keys and values of the rows, of the prompt that is read, and of earlier prompts.

        While rows move to other shapes, they exist twice. A prompt that is read keeps all of its tokens in every layer, with a
        window too; that of an encoder is not counted.
        """
        rows_ = jax.eval_shape(lambda: self._made(self._sizes[-1], self._length(self._longest)))
        return _bytes(rows_), _bytes(self._shapes_of(self._longest)), self._prefix_bytes

    @property
    def keys(self) -> Sequence[Hashable]:
        """The names of the rows that are continued."""
        return [*self._needs]

    def leave(self, key: Hashable) -> None:
        """Ends the row of a request."""
        self._keys[self._keys.index(key)] = None
        del self._needs[key]
        if not self._needs:
            self._rows, self._keys = None, []

    def join(
        self,
        key: Hashable,
        prompt: Sequence[int],
        draw: Draw,
        max_new_tokens: int,
        *,
        together: int = 1,
        between: Callable[[], None] = lambda: None,
    ) -> News:
        """Reads a prompt, which gets a free row, and chooses its first token.

        Args:
          key: name of the row.
          together: number of rows that are expected to be continued soon, this one included.
          between: called after each part of a long prompt but the last; may call `advance`.

        Raises:
          TooLargeError: there is no memory for so many slots; other rows are not affected.
        """
        reading = self._shapes_of(len(prompt))
        self._check_memory((reading, self._rows), len(prompt), self._sizes[0])
        self._reading = reading
        try:
            logits_PV, caches, context = self._read(prompt, between)
            read_tokens = 1 if self._model.row.encodes else len(prompt)
            # The last new token is never read.
            need = max(len(prompt), read_tokens + max_new_tokens - 1)
            least = len(self._needs) + 1
            try:
                self._fit(max(together, least), need)
            except TooLargeError:
                self._fit(least, need)  # those that come later have no room yet
            r = self._keys.index(None)
            own = {
                **{name: np.uint32(getattr(draw, name)) for name in ("seed", "index", "sample")},
                **{name: np.float32(getattr(draw, name)) for name in ("temperature", "top_p")},
            }
            numbers = (np.int32(r), np.int32(read_tokens), np.int32(max_new_tokens))
            self._rows, first = self._programs["join"](
                self._rows, logits_PV, caches, context, *numbers, own
            )
            token, log_prob, ended = jax.device_get(first)
            if not ended:
                self._keys[r], self._needs[key] = key, need
            return News(tokens=[int(token)], log_probs=[float(log_prob)], ended=bool(ended))
        finally:
            self._reading = None

    def advance(self, count: int, *, leave: bool = False) -> Mapping[Hashable, News]:
        """Continues all rows by up to `count` tokens, `most_steps` at most; with `leave`, only until the first ends. Returns what is new of each."""
        if not self._needs:
            return {}
        if not leave:
            # Without memory for a row of the prompt that is read, `join` says so.
            with contextlib.suppress(TooLargeError):
                self._fit(len(self._needs) + (self._reading is not None), 0)
        free_R = np.array([key is None for key in self._keys])
        count = min(count, self._most_steps)
        self._rows, made = self._programs["advance"](
            self._params, self._rows, free_R, np.int32(count), np.bool_(leave)
        )
        tokens_RC, log_probs_RC, counts_R, done_R = jax.device_get(made)
        news = {}
        for r, key in enumerate(self._keys):
            if key is None:
                continue
            n, ended = int(counts_R[r]), bool(done_R[r])
            tokens, log_probs = tokens_RC[r, :n].tolist(), log_probs_RC[r, :n].tolist()
            news[key] = News(tokens=tokens, log_probs=log_probs, ended=ended)
            if ended:
                self.leave(key)
        return news

    def _length(self, need: int) -> int:
        """Returns the number of slots of the batch for rows that need so many."""
        return max(_SHORTEST, bucket_length(need))

    def _fit(self, together: int, need: int) -> None:
        """Makes the batch one of its sizes and lengths that suffices for `together` rows, one of which needs `need` slots."""
        size = next(size for size in (*self._sizes, together) if size >= together)
        length = self._length(max([need, *self._needs.values()]))
        kept = [r for r, key in enumerate(self._keys) if key is not None]
        if kept and len(self._keys) == size and self._slots / 2 < length <= self._slots:
            return
        if not kept or length > self._slots or size > len(self._keys):
            shapes = jax.eval_shape(lambda: self._made(size, length))
            held = self._rows if kept else None
            self._check_memory((shapes, held, self._reading), length, size)
        if kept:
            rows_R = np.array(kept + [0] * (size - len(kept)), np.int32)
            self._rows = self._programs["resize"](self._rows, rows_R, size, length)
        else:
            self._rows = None  # freed first
            self._rows = self._programs["make"](size, length)
        self._keys = [self._keys[r] for r in kept] + [None] * (size - len(kept))
        self._slots = length

    def _check_memory(self, state: Any, length: int, size: int) -> None:
        """Raises TooLargeError unless arrays can be in memory, of which new ones have `length` slots in `size` rows."""
        check_memory(
            state,
            what=f"room for {length:,} tokens in each of {size:,} rows, beside what is held,",
            remedy="ask for fewer tokens or give a shorter prompt, or try again when fewer rows are continued",
            devices=1 if self._sharding is None else self._sharding.mesh.size,
        )

    def _shapes_of(self, tokens: int) -> Any:
        """Returns the shapes of the slots in which a prompt of so many tokens is read; none of an encoder."""
        if self._model.row.encodes:
            return []
        length = self._room(tokens)
        if length not in self._shapes:
            self._shapes[length] = jax.eval_shape(lambda: self._row(length))
        return self._shapes[length]

    def _room(self, tokens: int) -> int:
        """Returns the number of slots in which a prompt of so many tokens is read."""
        return min(_power(tokens), self._model.max_length or _power(tokens))

    def _read(self, prompt: Sequence[int], between: Callable[[], None]) -> Any:
        """Returns (logits_PV, caches, context) after a prompt, which is in every row."""
        if self._model.row.encodes:
            self.prompt_tokens_read += len(prompt)
            return self._programs["read inputs"](
                self._params, self._placed(prompt, _power(len(prompt))), np.int32(len(prompt))
            )
        at, found, whole = self.prefixes.longest(prompt)
        if whole:
            return found
        at = min(at, len(prompt) - 1)  # reading the last token gives the logits
        length = self._room(len(prompt))
        if at:
            caches = self._programs["take prefix"](found[1], np.int32(at), length)
        else:
            caches = self._programs["make row"](length)
        while True:
            size = min(_power(len(prompt) - at), self._chunk, length)
            at = min(at, length - size)  # the slots may end before: some tokens are read again
            tokens_PT = self._placed(prompt[at : at + size], size)
            made = self._programs["read"](
                self._params, tokens_PT, np.int32(at), np.int32(len(prompt)), caches
            )
            caches = made[1]
            self.prompt_tokens_read += min(size, len(prompt) - at)
            at += size
            if at >= len(prompt):
                break
            between()
        self.prefixes.add(prompt, made)
        return made

    def _placed(self, tokens: Sequence[int], size: int) -> jax.Array:
        """Returns tokens, padded to `size`, in all rows that are read."""
        tokens_PT = np.zeros((self._sizes[0], size), np.int32)
        tokens_PT[:, : len(tokens)] = tokens
        return jax.device_put(tokens_PT, self._sharding)

    # Programs.

    def _row(self, length: int) -> list[Slots]:
        """Returns empty slots in which a prompt is read."""
        size = {"batch": self._sizes[0], "length": length}
        return [cache.slots for cache in empty_caches(self._model, self._policy, **size)]

    def _read_tokens(self, params, tokens_PT, start, length, caches) -> Any:
        """Reads tokens from position `start` on, of a prompt of this length, whose first tokens are in the caches."""
        context = self._model.row_context({"params": params}, {})
        at_T = start + jnp.arange(tokens_PT.shape[1], dtype=jnp.int32)
        positions_PT = jnp.broadcast_to(jnp.where(at_T < length, at_T, -1), tokens_PT.shape)
        caches = [dataclasses.replace(cache, at=start) for cache in caches]
        with rows.given(context):
            # Without segments, tokens attend to the caches, masked by position.
            out = read(self._model, params, self._policy, tokens_PT, positions_PT, caches)
        last = jnp.clip(length - 1 - start, 0, tokens_PT.shape[1] - 1)
        last_P1D = jax.lax.dynamic_slice_in_dim(out.hidden_BTD, last, 1, axis=1)
        return self._logits(params, last_P1D), out.caches, context

    def _read_inputs(self, params, tokens_PT, length) -> Any:
        """Reads the inputs of an encoder-decoder, and the token that its targets follow."""
        lengths_P = jnp.broadcast_to(length, tokens_PT.shape[:1])
        columns, start_P1, lengths_P = self._model.row.prompts(
            tokens_PT, lengths_P, start=self._start
        )
        context = self._model.row_context({"params": params}, columns)
        with rows.given(context):
            logits_PV, caches = prefill(
                *(self._model, params, self._policy, start_P1, lengths_P),
                room=1,
                cache_dtype=self._dtype,
                encoder=rows.encoder_arguments(columns),
            )
        return logits_PV, caches, context

    def _logits(self, params: Any, hidden_B1D: jax.Array) -> jax.Array:
        return self._model.apply({"params": params}, hidden_B1D, method="logits")[:, 0]

    def _made(self, size: int, length: int) -> _Rows:
        """Returns a batch of `size` free rows of `length` slots; an encoder's output has as many places."""
        params = self._params
        if self._model.row.encodes:
            inputs = jax.ShapeDtypeStruct((self._sizes[0], length), jnp.int32)
            _, caches, context = jax.eval_shape(self._read_inputs, params, inputs, jnp.int32(1))
        else:
            caches = jax.eval_shape(lambda: self._row(length))
            context = jax.eval_shape(
                lambda params: self._model.row_context({"params": params}, {}), params
            )

        def ring(x: Any, window: int | None) -> Any:
            if not isinstance(x, Slots):
                return jnp.zeros((size, *x.shape[1:]), x.dtype)
            _, K, _, H = x.k_BKSH.shape
            shape = (size, K, length if window is None else min(window, length), H)
            dtype = (
                self._model.config.compute_dtype if x.k_scale_BKS is not None else x.k_BKSH.dtype
            )
            held = slots.empty(shape, dtype).stored_as(self._dtype)
            return dataclasses.replace(held, ring=0)

        windows = [self._model.cache_sizes(i)["kind"].window for i in range(len(caches))]
        numbers = {
            f"{name}_R": jnp.zeros(size, jnp.int32)
            for name in ("token", "position", "chosen", "left")
        }
        return _Rows(
            **numbers,
            done_R=jnp.ones(size, bool),
            key_R2=jax.random.key_data(jax.random.split(jax.random.key(0), size)),
            sampling=RowSampling(jnp.zeros(size), jnp.ones(size)),
            caches=[
                _each(functools.partial(ring, window=w), cache)
                for w, cache in zip(windows, caches, strict=True)
            ],
            context=_each(functools.partial(ring, window=None), context),
        )

    def _resized(self, held: _Rows, rows_R: jax.Array, size: int, length: int) -> _Rows:
        """Returns the rows at these indices in a batch of another shape."""

        def fit(x: Any, like: Any) -> Any:
            if isinstance(x, Slots):
                return x.resized(rows_R, like.length)
            return _padded(x[rows_R][tuple(map(slice, like.shape))], like.shape)

        return _each(fit, held, jax.eval_shape(lambda: self._made(size, length)))

    def _joined(self, held: _Rows, logits_PV, caches, context, r, length, most, own) -> Any:
        """Returns the batch with a row that was read at index `r`, and its first token, log-probability and whether it ends."""
        sampling = RowSampling(own["temperature"][None], own["top_p"][None])
        key = jax.random.fold_in(jax.random.key(own["seed"]), own["index"])
        key = jax.random.fold_in(key, own["sample"])
        step = jnp.int32(0)
        token_1, log_prob_1, ends_1 = choose(
            logits_PV[:1], key[None], step, self._settings, sampling=sampling
        )
        ended = ends_1[0] | (most <= 1)
        new = _Rows(
            token_R=token_1,
            position_R=length[None],
            chosen_R=jnp.ones(1, jnp.int32),
            left_R=most[None] - 1,
            done_R=ended[None],
            key_R2=jax.random.key_data(key)[None],
            sampling=sampling,
            caches=caches,
            context=context,
        )

        def put(x: Any, new: Any) -> Any:
            if isinstance(x, Slots):
                return x.with_row(r, new.stored_as(self._dtype), length)
            return x.at[r].set(_padded(new[0], x.shape[1:]))

        return _each(put, held, new), (token_1[0], log_prob_1[0], ended)

    def _advanced(self, params, held: _Rows, free_R, count, leave) -> Any:
        """Returns the batch after up to `count` tokens, and (tokens_RC, log_probs_RC, counts_R, done_R)."""
        whole, before_R = held.caches, held.chosen_R
        held = dataclasses.replace(held, done_R=held.done_R | free_R, caches=carried(whole))
        begun_R = held.done_R
        shape = (len(before_R), self._most_steps)
        made = (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

        def more(carry: Any) -> jax.Array:
            step, held, _ = carry
            waits = leave & jnp.any(held.done_R & ~begun_R)
            return (step < count) & ~jnp.all(held.done_R) & ~waits

        def body(carry: Any) -> Any:
            step, held, made = carry
            # A token of a row that has ended is marked as padding.
            position_R1 = jnp.where(held.done_R, -1, held.position_R)[:, None]
            caches = restored(held.caches, whole)
            token_R1 = held.token_R[:, None]
            with rows.given(held.context):
                out = read(self._model, params, self._policy, token_R1, position_R1, caches)
            logits_RV = self._logits(params, out.hidden_BTD)
            keys_R = jax.random.wrap_key_data(held.key_R2)
            options = {"sampling": held.sampling}
            token_R, log_prob_R, ends_R = choose(
                logits_RV, keys_R, held.chosen_R, self._settings, **options
            )
            going_R = (~held.done_R).astype(jnp.int32)
            made = tuple(
                jax.lax.dynamic_update_slice_in_dim(x, new_R[:, None].astype(x.dtype), step, axis=1)
                for x, new_R in zip(made, (token_R, log_prob_R), strict=True)
            )
            held = dataclasses.replace(
                held,
                token_R=token_R,
                position_R=held.position_R + going_R,
                chosen_R=held.chosen_R + going_R,
                left_R=held.left_R - going_R,
                done_R=held.done_R | ends_R | (held.left_R <= 1),
                caches=carried(out.caches),
            )
            return step + 1, held, made

        _, held, made = jax.lax.while_loop(more, body, (jnp.int32(0), held, made))
        held = dataclasses.replace(held, caches=restored(held.caches, whole))
        return held, (*made, held.chosen_R - before_R, held.done_R)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _power(length: int) -> int:
    """Returns the smallest power of two that is at least `length` and SMALLEST."""
    return 1 << (max(length, SMALLEST) - 1).bit_length()


def _each(change: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Returns a tree with `change` of its `Slots` and other arrays."""
    return jax.tree.map(change, tree, *others, is_leaf=lambda x: isinstance(x, Slots))


def _padded(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns an array with zeros up to a shape: no token sees an encoder's places without a segment."""
    after = [(0, more - own, 0) for own, more in zip(x.shape, shape, strict=True)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), after)


def _beginning(caches: list[Slots], count: jax.Array, length: int) -> list[Slots]:
    """Returns slots of another number with the first `count` tokens."""

    def take(held: Slots) -> Slots:
        end = jnp.int32(
            length if length < held.length else 0
        )  # the first slots are the latest before it
        held = dataclasses.replace(held, at=end)
        held = held.resized(jnp.arange(held.k_BKSH.shape[0]), length)
        known_S = jnp.arange(length) < count
        return dataclasses.replace(held, positions_BXS=jnp.where(known_S, held.positions_BXS, -1))

    return [take(held) for held in caches]
