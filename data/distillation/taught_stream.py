"""A stream of packed tokens with a teacher's predictions for each position, read from a store.

A row's key is a digest of the teacher's input: tokens, positions and segments. Another vocabulary, packing or row
length changes the digests; another order, batch size or number of hosts does not.

Shapes: B rows, T length, K stored tokens of each position.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data.preference.reference_store import ReferenceStore

FOLDER = "teacher_log_probs"
READ = ("decoder_input_tokens", "decoder_positions", "decoder_segment_ids")


def row_digests(batch: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the digest of each row, as hexadecimal text."""
    columns = [np.ascontiguousarray(batch[name], np.int32) for name in READ]
    return [
        hashlib.blake2b(
            b"".join(column[b].tobytes() for column in columns), digest_size=16
        ).hexdigest()
        for b in range(len(columns[0]))
    ]


def shape_of(length: int, top_k: int) -> tuple[int, int]:
    """Returns the shape of a row's value: per position K ids (exact in float32 below 2^24) and K + 1 log-probabilities."""
    return length, 2 * top_k + 1


class TaughtStream:
    """A stream with the additional columns 'teacher_ids' [B, T, K] and 'teacher_log_probs' [B, T, K + 1].

    All other attributes are those of the wrapped stream.

    Args:
      stream: stream of packed tokens.
      store: has values of all rows of the stream.
      top_k: K.
      teacher: digest of the teacher's parameters.
    """

    def __init__(self, stream: Any, store: ReferenceStore, *, top_k: int, teacher: str):
        self._stream, self._store, self._top_k, self._teacher = stream, store, top_k, teacher

    def summary(self) -> dict[str, Any]:
        """Returns the stream's summary, with the digest of the teacher's parameters."""
        return {**self._stream.summary(), "teacher": self._teacher}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns rows [lo, hi) of the batch of `step`."""
        batch = self._stream.batch(step, lo, hi)
        values = self._store.get(row_digests(batch))
        return {
            **batch,
            "teacher_ids": values[..., : self._top_k].astype(np.int32),
            "teacher_log_probs": values[..., self._top_k :],
        }
