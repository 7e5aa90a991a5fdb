"""Log-likelihoods of targets under an encoder-decoder, and whether greedy decoding would generate them.

Shapes: B rows, T length of targets, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from espalier.trainers.decoding.buckets import bucket_length
from espalier.trainers.objectives.forward import frozen_forward
from espalier.trainers.scoring.likelihoods import Likelihood, Likelihoods
from espalier.trainers.scoring.scoring import Batched, Row, encoded_columns


class EncoderLikelihoods(Likelihoods):
    """Scores rows with encoder inputs, whose context is the start token; `model` is an encoder-decoder."""

    CONTEXT = "encoder_inputs"

    def __init__(self, model: Any, params: Any, **batches: Any):
        super().__init__(model, params, **batches)

        def scores(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
            out = frozen_forward(model, params, batch)
            return out.log_probs_BT(), out.most_likely_BT() == batch["decoder_target_tokens"]

        self._scores = scores
        self._read: dict[int, Batched] = {}  # by rows of a batch

    def _stream(self, rows: Sequence[Row], quiet: bool) -> Iterator[tuple[int, Likelihood]]:
        read = self._reader(rows)
        lengths = [row.inputs for row in rows]
        title = None if quiet else "score"
        for i, (logp_T, greedy_T) in read(self._params, rows, lengths, title=title):
            count = len(rows[i].targets)  # the start token is the whole context
            total = float(np.asarray(logp_T)[:count].sum(dtype=np.float64))
            yield i, Likelihood(total, bool(greedy_T[:count].all()))

    def _reader(self, rows: Sequence[Row]) -> Batched:
        longest = max(
            (bucket_length(len(row.encoder_inputs)) + bucket_length(row.inputs) for row in rows),
            default=1,
        )
        size = max(1, self._batch_tokens // longest)
        size = min(size, self._batch_size or size, max(1, len(rows)))
        size = -(-size // self._row_shards) * self._row_shards
        if size not in self._read:
            options: dict[str, Any] = {"batch_size": size, "sharding": self._sharding}
            self._read[size] = Batched(self._scores, encoded_columns, self._model, **options)
        return self._read[size]
