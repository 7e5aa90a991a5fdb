"""Log-likelihoods of continuations, and whether greedy decoding would generate them.

This is for evaluation by ranking, with many short continuations of long contexts. Logits are computed only
for predicted targets. A context with several continuations is read once, and its keys and values are used
for all of them.

Shapes: B rows, T length, K continuations of a row, C their length, R = B K, Q predicted tokens of a batch,
D width, V vocabulary.
"""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from model.kv_cache.full import FullCache
from trainers.decoding.buckets import bucket_length, padded
from trainers.decoding.prefill import empty_caches, read
from trainers.programs import program as programs
from trainers.scoring.scoring import Row, check_lengths

_CHUNK_LOGITS = 2**26  # float32 logits in memory at a time: 256 MiB
_FEWEST = 16  # minimum number of predicted tokens of a program
_SHORTEST_TAIL = 16
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
    model: Any, params: Any, hidden_XD: jax.Array, places_Q: jax.Array, targets_Q: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (log p(target) [Q], whether the target is the most probable token [Q]).

    Args:
      places_Q: index of the hidden state that predicts each target.
      targets_Q: target tokens; Q must be a power of two.
    """
    hidden_QD = hidden_XD[places_Q]

    def chunk(hidden_CD: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_CV = model.apply({"params": params}, hidden_CD[None], method="logits")[0]
        logits_CV = logits_CV.astype(jnp.float32)
        target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        greedy_C = jnp.argmax(logits_CV, axis=-1) == targets_C
        return target_C - jax.nn.logsumexp(logits_CV, axis=-1), greedy_C

    # A power of two, so that it divides the number of targets.
    size = 1 << max(1, _CHUNK_LOGITS // model.config.vocab_size).bit_length() - 1
    if len(targets_Q) <= size:
        return chunk(hidden_QD, targets_Q)
    split = (hidden_QD.reshape(-1, size, hidden_QD.shape[-1]), targets_Q.reshape(-1, size))
    logp_JC, greedy_JC = jax.lax.map(lambda part: chunk(*part), split)
    return logp_JC.reshape(-1), greedy_JC.reshape(-1)


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
    def shape(self) -> tuple[int, int, int]:
        """(K, C, T), each rounded up to one of few sizes; T may exceed the learned positions."""
        length = bucket_length(len(self.tokens))
        if not self.tails:
            return 0, 0, length
        longest = max(_SHORTEST_TAIL, *map(len, self.tails))
        return _power_of_two(len(self.tails)), _power_of_four(longest), length


class LikelihoodScorer:
    """Scores continuations in batches of similar length; compiles once for each of a few shapes.

    Args:
      model: a decoder-only module with unrolled layers.
      batch_tokens: number of tokens of a batch, including padding; determines its number of rows.
      batch_size: maximum number of rows; None for as many as batch_tokens allows.
      row_shards: the number of rows of a batch is a multiple of this.
      sharding: sharding of a batch's rows; calls must be within its mesh. None on one device.
    """

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
        self._params = params
        self._max_length = model.max_length
        self._batch_tokens = batch_tokens
        self._batch_size = batch_size
        self._row_shards = row_shards
        self._sharding = sharding
        whole = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())

        def log_probs(params: Any, places_Q: Any, targets_Q: Any, *rows: Any) -> Any:
            hidden_XD = hidden_states(model, params, *rows)
            return log_probs_at(model, params, hidden_XD, places_Q, targets_Q)

        self._log_probs = programs.jit(log_probs, out_shardings=whole)

    def use(self, params: Any) -> None:
        """Sets other parameters of the same shapes, for which all programs stay."""
        self._params = params

    def stream(
        self, rows: Sequence[Row], *, quiet: bool = False
    ) -> Iterator[tuple[int, Likelihood]]:
        """Yields (index, likelihood) of every row, batch by batch, the longest first; `quiet` hides the progress bar.

        Raises:
          ValueError: a row has no context or no targets, or is longer than the learned positions.
        """
        for i, row in enumerate(rows):
            if not len(row.context) or not len(row.targets):
                raise ValueError(f"Row {i} has no context or no targets: nothing can be predicted.")
        check_lengths([row.inputs for row in rows], self._max_length)
        return self._stream(rows, quiet)

    def _stream(self, rows: Sequence[Row], quiet: bool) -> Iterator[tuple[int, Likelihood]]:
        with tqdm(total=len(rows), desc="score", unit="request", disable=quiet or None) as progress:
            for shape, batch, size in self.batches(readings(rows)):
                for i, likelihood in self._score(rows, shape, batch, size):
                    progress.update()
                    yield i, likelihood

    def batches(
        self, readings: Sequence[Reading]
    ) -> Iterator[tuple[tuple[int, int, int], Sequence[Reading], int]]:
        """Yields (shape, readings of the batch, number of rows), in the order of the readings.

        A batch that is not full also gets readings of smaller shapes, because compiling another program
        takes longer than running a batch.
        """
        first = 0
        while first < len(readings):
            shape = count, tail_length, length = readings[first].shape
            most = max(1, self._batch_tokens // (length + count * tail_length))
            most = self._sharded(min(most, self._batch_size or most))
            last = first + 1
            while (
                last < len(readings) and last - first < most and _fits(readings[last].shape, shape)
            ):
                last += 1
            # The last batch is not padded to a full batch.
            yield shape, readings[first:last], min(most, self._sharded(_power_of_two(last - first)))
            first = last

    def _sharded(self, count: int) -> int:
        """Returns the smallest multiple of the number of shards that is at least `count`."""
        return -(-count // self._row_shards) * self._row_shards

    def _score(
        self, rows: Sequence[Row], shape: tuple[int, int, int], batch: Sequence[Reading], size: int
    ) -> Iterator[tuple[int, Likelihood]]:
        count, tail_length, length = shape
        length = length if self._max_length is None else min(length, self._max_length)
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
                if count:  # the context predicts the first target, the tail the rest
                    begin = size * length + (b * count + (tail or 0)) * tail_length
                    places += [after - 1, *range(begin, begin + len(row_targets) - 1)]
                else:
                    places += range(after - len(row_targets), after)
                targets += row_targets
                ends.append((i, len(targets)))
        extra = _power_of_four(max(_FEWEST, len(targets))) - len(targets)
        places_Q, targets_Q = (np.pad(x, (0, extra)).astype(np.int32) for x in (places, targets))
        arrays = jax.device_put(arrays, self._sharding)
        logp_Q, greedy_Q = map(
            np.asarray, self._log_probs(self._params, places_Q, targets_Q, *arrays)
        )
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


def _fits(shape: tuple[int, int, int], into: tuple[int, int, int]) -> bool:
    """Returns whether a batch of shape `into` can hold a reading of `shape`: both or neither have tails."""
    return (shape[0] > 0) == (into[0] > 0) and all(map(operator.le, shape, into))


def _power_of_four(count: int) -> int:
    return 1 << (count - 1).bit_length() + (count - 1).bit_length() % 2


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
