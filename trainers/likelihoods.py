"""Log-likelihoods of continuations, and whether greedy decoding would give them.

What evaluation by ranking needs, of many short continuations of long contexts: the vocabulary's logits
are computed where a token is predicted that counts, and nowhere else, and rows that read the same tokens
are read once, as those of one context and several continuations of one token are.

Shapes: B rows, T length, Q predicted tokens of a batch, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from trainers.buckets import bucket_length, longest_row
from trainers.scoring import Row

_CHUNK_LOGITS = 2**26  # float32 logits at a time: 256 MiB
_FEWEST = 16  # predicted tokens of a program


class Likelihood(NamedTuple):
    """Of one continuation.

    Attributes:
      log_prob: sum over its tokens.
      greedy: whether each is the most probable one at its place (the first of equals).
    """

    log_prob: float
    greedy: bool


def log_probs_at(
    model: Any,
    params: Any,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    places_Q: jax.Array,
    targets_Q: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(log p(target) [Q], whether target is the most probable token [Q]) after given tokens.

    Args:
      model: a decoder-only module.
      params: its parameters.
      tokens_BT: rows; what segments_BT has as 0 is padding at the end.
      segments_BT: 1 for tokens.
      places_Q: b * T + t of the last token that is read before each target.
      targets_Q: tokens to be predicted.
    """
    variables = {"params": params}
    hidden_BTD = model.apply(
        variables, tokens_BT, segments_BT=segments_BT, method="hidden"
    ).hidden_BTD
    hidden_QD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[places_Q]

    def chunk(hidden_CD: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_CV = model.apply(variables, hidden_CD[None], method="logits")[0]
        logits_CV = logits_CV.astype(jnp.float32)
        target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        greedy_C = jnp.argmax(logits_CV, axis=-1) == targets_C
        return target_C - jax.nn.logsumexp(logits_CV, axis=-1), greedy_C

    # A power of two, as the number of targets is.
    size = 1 << max(1, _CHUNK_LOGITS // model.config.vocab_size).bit_length() - 1
    if len(targets_Q) <= size:
        return chunk(hidden_QD, targets_Q)
    split = (hidden_QD.reshape(-1, size, hidden_QD.shape[-1]), targets_Q.reshape(-1, size))
    logp_JC, greedy_JC = jax.lax.map(lambda part: chunk(*part), split)
    return logp_JC.reshape(-1), greedy_JC.reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Read:
    """Tokens that are read once, and the rows whose targets they predict."""

    tokens: tuple[int, ...]
    rows: list[int]


class LikelihoodScorer:
    """Scores continuations in batches of similar length; compiles once for each of a few shapes.

    Args:
      model: a decoder-only module.
      params: its parameters.
      batch_tokens: tokens of a batch, padding included; the number of its rows follows.
      batch_size: rows at most; None for as many as batch_tokens allows.
      row_shards: a batch has a multiple of so many rows.
      sharding: of the rows of a batch, to be used within its mesh; None on one device.
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
        self._batch_tokens = batch_tokens
        self._batch_size = batch_size
        self._row_shards = row_shards
        self._sharding = sharding
        whole = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
        self._log_probs = jax.jit(
            lambda params, *arrays: log_probs_at(model, params, *arrays), out_shardings=whole
        )

    def stream(
        self, rows: Sequence[Row], *, quiet: bool = False
    ) -> Iterator[tuple[int, Likelihood]]:
        """(index, likelihood) of every row, batch by batch, the longest first.

        Args:
          rows: contexts and targets.
          quiet: show no progress.

        Raises:
          ValueError: a row without context or targets, or longer than the model's learned positions.
        """
        limit = longest_row(self._params)
        for i, row in enumerate(rows):
            if not len(row.context) or not len(row.targets):
                raise ValueError(f"Row {i} has no context or no targets: nothing can be predicted.")
            length = len(row.context) + len(row.targets) - 1
            if limit is not None and length > limit:
                raise ValueError(
                    f"Row {i} has {length} tokens, but the model learned only {limit} positions."
                )
        return self._stream(rows, limit, quiet)

    def _stream(
        self, rows: Sequence[Row], limit: int | None, quiet: bool
    ) -> Iterator[tuple[int, Likelihood]]:
        with tqdm(total=len(rows), desc="score", unit="request", disable=quiet or None) as progress:
            for batch, size, length in self._batches(_reads(rows), limit):
                for i, found in self._score(rows, batch, size, length):
                    progress.update()
                    yield i, found

    def _batches(
        self, reads: Sequence[_Read], limit: int | None
    ) -> Iterator[tuple[Sequence[_Read], int, int]]:
        """(what is read, rows of the batch, their length)."""
        first = 0
        while first < len(reads):
            length = bucket_length(len(reads[first].tokens), limit=limit)
            size = max(1, self._batch_tokens // length)
            # What remains at the end is not filled up to a whole batch.
            size = min(size, _power_of_two(len(reads) - first), self._batch_size or size)
            size = -(-size // self._row_shards) * self._row_shards
            yield reads[first : first + size], size, length
            first += size

    def _score(
        self, rows: Sequence[Row], batch: Sequence[_Read], size: int, length: int
    ) -> Iterator[tuple[int, Likelihood]]:
        tokens_BT = np.zeros((size, length), np.int32)
        segments_BT = np.zeros_like(tokens_BT)
        places: list[int] = []
        targets: list[int] = []
        ends: list[tuple[int, int]] = []  # (row, where its targets end)
        for b, read in enumerate(batch):
            tokens_BT[b, : len(read.tokens)] = read.tokens
            segments_BT[b, : len(read.tokens)] = 1
            for i in read.rows:
                after = b * length + len(read.tokens)
                places.extend(range(after - len(rows[i].targets), after))
                targets.extend(rows[i].targets)
                ends.append((i, len(targets)))
        extra = _power_of_two(max(_FEWEST, len(targets))) - len(targets)
        places_Q, targets_Q = (np.pad(x, (0, extra)).astype(np.int32) for x in (places, targets))
        arrays = jax.device_put((tokens_BT, segments_BT), self._sharding)
        found = self._log_probs(self._params, *arrays, places_Q, targets_Q)
        logp_Q, greedy_Q = map(np.asarray, found)
        begin = 0
        for i, end in ends:
            # float64, so that the sum does not depend on what else is in the batch.
            total = float(logp_Q[begin:end].sum(dtype=np.float64))
            yield i, Likelihood(total, bool(greedy_Q[begin:end].all()))
            begin = end


def _reads(rows: Sequence[Row]) -> list[_Read]:
    """What must be read, the longest first; the last target of a row is predicted, never read."""
    shared: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        shared.setdefault((*row.context, *row.targets[:-1]), []).append(i)
    return sorted((_Read(*item) for item in shared.items()), key=lambda read: -len(read.tokens))


def _power_of_two(count: int) -> int:
    """The smallest that is not less than `count`."""
    return 1 << (count - 1).bit_length()
