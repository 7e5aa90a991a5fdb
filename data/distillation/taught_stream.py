"""A stream of packed tokens with what a teacher predicts in the place of each, from a store.

A row is known by a digest of what the teacher reads of it: tokens, positions and segments. Another vocabulary, packing or
row length gives other digests; another order, batch size or number of hosts does not.

Shapes: B rows, T length, K stored tokens of each place.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data.preference.reference_store import ReferenceStore

FOLDER = "teacher_log_probs"
READ = ("decoder_input_tokens", "decoder_positions", "decoder_segment_ids")


def row_digests(batch: Mapping[str, np.ndarray]) -> list[str]:
    """Returns a digest of each row, hexadecimal."""
    columns = [np.ascontiguousarray(batch[name], np.int32) for name in READ]
    return [
        hashlib.blake2b(
            b"".join(column[b].tobytes() for column in columns), digest_size=16
        ).hexdigest()
        for b in range(len(columns[0]))
    ]


def shape_of(length: int, top_k: int) -> tuple[int, int]:
    """Shape of a row's value in a store: K ids, which float32 holds exactly below 2^24, then K + 1 log-probabilities."""
    return length, 2 * top_k + 1


class TaughtStream:
    """A stream whose batches have the columns 'teacher_ids' [B, T, K] and 'teacher_log_probs' [B, T, K + 1]; all else is
    the stream's.

    Args:
      stream: of packed tokens.
      store: has values of all rows that are read.
      top_k: K.
      teacher: digest of its parameters.
    """

    def __init__(self, stream: Any, store: ReferenceStore, *, top_k: int, teacher: str):
        self._stream, self._store, self._top_k, self._teacher = stream, store, top_k, teacher

    def summary(self) -> dict[str, Any]:
        """That of the stream, and which parameters it is taught by."""
        return {**self._stream.summary(), "teacher": self._teacher}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Rows [lo, hi) of the batch of `step`."""
        batch = self._stream.batch(step, lo, hi)
        values = self._store.get(row_digests(batch))
        return {
            **batch,
            "teacher_ids": values[..., : self._top_k].astype(np.int32),
            "teacher_log_probs": values[..., self._top_k :],
        }
