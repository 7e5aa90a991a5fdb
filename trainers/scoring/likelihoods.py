"""Log-likelihoods of continuations, and whether greedy decoding would generate them.

This is for evaluation by ranking, with many short continuations of long contexts. Logits are computed only
for predicted targets. A context with several continuations is read once, and its keys and values are used
for all of them.

Shapes: B rows, T length, K continuations of a row, C their length, R = B K, Q predicted tokens of a batch,
D width, V vocabulary.
"""

import abc
import collections
import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from espalier.common.bars import Bar
from espalier.model.kv_cache.full import FullCache
from espalier.trainers.decoding import buckets
from espalier.trainers.decoding.buckets import padded
from espalier.trainers.decoding.prefill import empty_caches, read
from espalier.trainers.scoring.scoring import Row, check_lengths

_CHUNK = 256  # predicted tokens whose logits are in memory at a time; a power of two
_WORTH_SHARING = 16  # minimum tokens of a shared context; reading a shorter one again is as fast


class Likelihood(NamedTuple):
    """The log-probability of one continuation.

    Attributes:
      log_prob: sum over its tokens.
      greedy: whether each token is the most probable token at its position (ties go to the first).
    """

    log_prob: float
    greedy: bool


def hidden_states(
    model: Any,
    params: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    tails_RC: jax.Array | None = None,
    tail_lengths_R: jax.Array | None = None,
) -> jax.Array:
    """Returns the hidden states [B T (+ R C), D] of rows, and of K tails of each row, which do not attend to each other.

    Args:
      model: a decoder-only module with unrolled layers.
      tokens_BT, lengths_B: rows, padded at the end, and their lengths.
      tails_RC, tail_lengths_R: tail r follows row r // K; None for no tails.
    """
    B, T = tokens_BT.shape
    at_T = jnp.arange(T, dtype=jnp.int32)[None]
    real_BT = at_T < lengths_B[:, None]
    segments_BT = real_BT.astype(jnp.int32)
    if tails_RC is None:
        out = model.apply({"params": params}, tokens_BT, segments_BT=segments_BT, method="hidden")
        return out.hidden_BTD.reshape(B * T, -1)
    assert tail_lengths_R is not None
    R, C = tails_RC.shape
    policy = FullCache()
    caches = empty_caches(model, policy, batch=B, length=T + C)
    positions_BT = jnp.where(real_BT, at_T, -1)
    out = read(model, params, policy, tokens_BT, positions_BT, caches, segments_BT)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, R // B, axis=0) if x.ndim else x, out.caches)
    at_C = jnp.arange(C, dtype=jnp.int32)[None]
    after_RC = jnp.repeat(lengths_B, R // B)[:, None] + at_C
    positions_RC = jnp.where(at_C < tail_lengths_R[:, None], after_RC, -1)
    tail = read(model, params, policy, tails_RC, positions_RC, repeated)
    parts = (out.hidden_BTD.reshape(B * T, -1), tail.hidden_BTD.reshape(R * C, -1))
    return jnp.concatenate(parts)


def log_probs_at(
    model: Any,
    params: Any,
    hidden_XD: jax.Array,
    places_Q: jax.Array,
    targets_Q: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns (log p(target) [Q], whether the target is the most probable token [Q]).

    Args:
      places_Q: index of the hidden state that predicts each target.
      targets_Q: target tokens; Q must be a power of two.
      count: number of targets that are no padding. Padding takes no time, and has no meaningful results.
    """
    hidden_QD = hidden_XD[places_Q]
    size = min(_CHUNK, len(targets_Q))

    def chunk(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_CD = jax.lax.dynamic_slice_in_dim(hidden_QD, i * size, size)
        targets_C = jax.lax.dynamic_slice_in_dim(targets_Q, i * size, size)
        logits_CV = model.apply({"params": params}, hidden_CD[None], method="logits")[0]
        logits_CV = logits_CV.astype(jnp.float32)
        target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        logp_C = target_C - jax.nn.logsumexp(logits_CV, axis=-1)
        parts = logp_C, jnp.argmax(logits_CV, axis=-1) == targets_C
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0)
        logp_Q, greedy_Q = (put(array, part) for array, part in zip(results, parts, strict=True))
        return logp_Q, greedy_Q

    empty = jnp.zeros(len(targets_Q), jnp.float32), jnp.zeros(len(targets_Q), bool)
    return jax.lax.fori_loop(0, (count + size - 1) // size, chunk, empty)


class Shape(NamedTuple):
    """Sizes of a reading in a program, each at least that of every reading in it.

    Attributes:
      tails: K, the number of tails.
      tail_length: C.
      length: T; may exceed the learned positions.
    """

    tails: int
    tail_length: int
    length: int

    @property
    def tokens(self) -> int:
        """Number of tokens of a reading, padding included."""
        return self.length + self.tails * self.tail_length

    def fits(self, into: "Shape") -> bool:
        """Returns whether a program of shape `into` can read a reading of this shape."""
        return all(map(operator.le, self, into))

    def joined(self, other: "Shape") -> "Shape":
        """Returns the smallest shape into which both fit."""
        return Shape(*map(max, self, other))


class Program(NamedTuple):
    """The shape of a program's readings, and their number in a batch."""

    shape: Shape
    size: int

    def tokens(self, count: int) -> int:
        """Number of tokens of all batches of `count` readings, padding included."""
        return -(-count // self.size) * self.size * self.shape.tokens


class Group(NamedTuple):
    """Readings that one program reads.

    Attributes:
      shape: a shape into which they fit.
      number: how many they are.
      total: their number and that of readings of their shapes in earlier calls. Many small calls then get the programs that
        a large one gets.
    """

    shape: Shape
    number: int
    total: int

    def joined(self, other: "Group") -> "Group":
        """Returns the group of the readings of both."""
        shape = self.shape.joined(other.shape)
        return Group(shape, self.number + other.number, self.total + other.total)


@dataclasses.dataclass(frozen=True)
class Reading:
    """Tokens that are read once, and the rows whose targets are predicted from them.

    Attributes:
      tokens: the tokens of a row without its last target, which is not read, or the shared context of several rows.
      tails: the targets, without the last, that are read after the shared context; () for whole rows.
      rows: (index of a row, index of its tail; None if no tail is read after `tokens`).
    """

    tokens: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]
    rows: list[tuple[int, int | None]]

    @property
    def shape(self) -> Shape:
        """Its sizes, the lengths rounded up a little, so that there are not too many different shapes to choose from."""
        tail_length = _rounded(max(map(len, self.tails), default=0))
        return Shape(len(self.tails), tail_length, _rounded(len(self.tokens)))


class Likelihoods(abc.ABC):
    """Scores continuations in batches of similar length.

    Args:
      model: see the classes.
      batch_tokens: maximum number of tokens of a batch, including padding, unless one row has more.
      batch_size: maximum number of rows; None for as many as batch_tokens allows.
      row_shards: the number of rows of a batch is a multiple of this.
      sharding: sharding of a batch's rows; calls must be within its mesh. None on one device.
    """

    CONTEXT: ClassVar[str]  # field of a row that may not be empty

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        batch_tokens: int,
        batch_size: int | None = None,
        row_shards: int = 1,
        sharding: NamedSharding | None = None,
    ):
        self._model, self._params, self._max_length = model, params, model.max_length
        self._batch_tokens, self._batch_size = batch_tokens, batch_size
        self._row_shards, self._sharding = row_shards, sharding

    def use(self, params: Any) -> None:
        """Sets other parameters of the same shapes, for which all programs stay."""
        self._params = params

    def stream(
        self, rows: Sequence[Row], *, quiet: bool = False
    ) -> Iterator[tuple[int, Likelihood]]:
        """Yields (index, likelihood) of every row, batch by batch, the longest first; `quiet` hides the progress bar.

        Raises:
          ValueError: a row has no context (of an encoder-decoder: no inputs) or no targets, or is longer than the learned
            positions.
        """
        for i, row in enumerate(rows):
            if not len(getattr(row, self.CONTEXT)) or not len(row.targets):
                name = self.CONTEXT.removeprefix("encoder_")
                raise ValueError(f"Row {i} has no {name} or no targets: nothing can be predicted.")
        check_lengths([row.inputs for row in rows], self._max_length)
        return self._stream(rows, quiet)

    @abc.abstractmethod
    def _stream(self, rows: Sequence[Row], quiet: bool) -> Iterator[tuple[int, Likelihood]]: ...


class LikelihoodScorer(Likelihoods):
    """Scores continuations with few programs; `model` is a decoder-only module with unrolled layers.

    A program's batches are equal in size and shape. Another program is made only if it saves more padding than it costs
    (trainers/decoding/buckets.py); later calls use the programs of earlier ones, which cost nothing more.
    """

    CONTEXT = "context"

    def __init__(self, model: Any, params: Any, **batches: Any):
        super().__init__(model, params, **batches)
        self._program_tokens = buckets.program_tokens(model, params)
        self._programs: set[Program] = set()
        self._earlier: collections.Counter[Shape] = collections.Counter()  # of earlier calls
        whole = (
            None if self._sharding is None else NamedSharding(self._sharding.mesh, PartitionSpec())
        )

        def log_probs(params: Any, places_Q: Any, targets_Q: Any, count: Any, *rows: Any) -> Any:
            hidden_XD = hidden_states(model, params, *rows)
            return log_probs_at(model, params, hidden_XD, places_Q, targets_Q, count)

        self._log_probs = jax.jit(log_probs, out_shardings=whole)

    def _stream(self, rows: Sequence[Row], quiet: bool) -> Iterator[tuple[int, Likelihood]]:
        with Bar(total=len(rows), desc="score", unit="request", disable=quiet or None) as progress:
            for program, batch in self.batches(readings(rows)):
                for i, likelihood in self._score(rows, program, batch):
                    progress.update()
                    yield i, likelihood

    def batches(self, readings: Sequence[Reading]) -> Iterator[tuple[Program, Sequence[Reading]]]:
        """Yields (program, readings of the batch), those of the program with the longest readings first."""
        same: dict[Shape, list[Reading]] = {}
        for reading in readings:
            same.setdefault(reading.shape, []).append(reading)
        groups = buckets.grouped(
            [Group(shape, len(x), len(x) + self._earlier[shape]) for shape, x in same.items()],
            Group.joined,
            lambda group: self._program(group)[0],
        )
        self._earlier.update({shape: len(x) for shape, x in same.items()})
        for group, members in sorted(groups, key=lambda g: g[0].shape.tokens, reverse=True):
            _, program = self._program(group)
            self._programs.add(program)
            chosen = [reading for member in members for reading in same[member.shape]]
            for begin in range(0, len(chosen), program.size):
                yield program, chosen[begin : begin + program.size]

    def _program(self, group: Group) -> tuple[float, Program]:
        """Returns (cost in tokens, program) of the cheapest program for a group."""

        def most(shape: Shape) -> int:
            rows = max(1, self._batch_tokens // shape.tokens)
            return self._sharded(min(rows, self._batch_size or rows))

        # As few batches as possible, of equal size, so that the last one has little padding.
        batches = -(-group.number // most(group.shape))
        new = Program(group.shape, self._sharded(-(-group.number // batches)))
        options = [(new.tokens(group.total) + self._program_tokens, new)]
        for program in self._programs:
            # Batches much smaller than possible would be slow.
            smallest = min(group.number, most(program.shape)) / 2
            if group.shape.fits(program.shape) and program.size >= smallest:
                options.append((program.tokens(group.total), program))
        return min(options)

    def _sharded(self, count: int) -> int:
        """Returns the smallest multiple of the number of shards that is at least `count`."""
        return -(-count // self._row_shards) * self._row_shards

    def _score(
        self, rows: Sequence[Row], program: Program, batch: Sequence[Reading]
    ) -> Iterator[tuple[int, Likelihood]]:
        (count, tail_length, length), size = program
        # Almost always enough for all targets, so that their number does not change the program.
        room = size * program.shape.tokens
        if self._max_length is not None:
            length, tail_length = (min(x, self._max_length) for x in (length, tail_length))
        arrays = [*padded([reading.tokens for reading in batch], size, length)]
        if count:
            tails = [r.tails[k] if k < len(r.tails) else () for r in batch for k in range(count)]
            arrays += padded(tails, size * count, tail_length)
        places: list[int] = []
        targets: list[int] = []
        ends: list[tuple[int, int]] = []  # (row, end of its targets)
        for b, reading in enumerate(batch):
            after = b * length + len(reading.tokens)
            for i, tail in reading.rows:
                row_targets = rows[i].targets
                if reading.tails:  # the context predicts the first target, the tail the rest
                    begin = size * length + (b * count + (tail or 0)) * tail_length
                    places += [after - 1, *range(begin, begin + len(row_targets) - 1)]
                else:
                    places += range(after - len(row_targets), after)
                targets += row_targets
                ends.append((i, len(targets)))
        extra = _power_of_two(max(room, len(targets))) - len(targets)
        places_Q, targets_Q = (np.pad(x, (0, extra)).astype(np.int32) for x in (places, targets))
        arrays = jax.device_put(arrays, self._sharding)
        results = self._log_probs(
            self._params, places_Q, targets_Q, np.int32(len(targets)), *arrays
        )
        logp_Q, greedy_Q = map(np.asarray, results)
        begin = 0
        for i, end in ends:
            # float64, so that the sum does not depend on the other rows of the batch.
            total = float(logp_Q[begin:end].sum(dtype=np.float64))
            yield i, Likelihood(total, bool(greedy_Q[begin:end].all()))
            begin = end


def readings(rows: Sequence[Row]) -> list[Reading]:
    """Returns the readings of rows, sorted by shape, the largest first."""
    contexts: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        contexts.setdefault(tuple(row.context), []).append(i)
    whole: dict[tuple[int, ...], list[tuple[int, int | None]]] = {}
    each: list[Reading] = []
    for context, members in contexts.items():
        read_after = [tuple(rows[i].targets[:-1]) for i in members]
        if len(context) < _WORTH_SHARING or len(set(read_after)) == 1:
            for i, tail in zip(members, read_after, strict=True):
                whole.setdefault((*context, *tail), []).append((i, None))
            continue
        numbers = {tail: n for n, tail in enumerate(dict.fromkeys(filter(None, read_after)))}
        served = [(i, numbers.get(tail)) for i, tail in zip(members, read_after, strict=True)]
        each.append(Reading(context, tuple(numbers), served))
    each += [Reading(tokens, (), members) for tokens, members in whole.items()]
    return sorted(each, key=lambda reading: reading.shape, reverse=True)


def _rounded(length: int) -> int:
    """Returns the smallest multiple of 8 that is at least `length`; above 128 of an eighth of the power of two below it."""
    step = max(8, _power_of_two(length) // 16)
    return -(-length // step) * step


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
