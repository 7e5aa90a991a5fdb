"""A stream of packed tokens with a teacher's predictions for each position, read from a store.

A row's key is a digest of the teacher's input: tokens, positions and segments. Another vocabulary, packing or row
length changes the digests; another order, batch size or number of hosts does not.

Shapes: B rows, T length, K stored tokens of each position.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.data.stream.predictions import PredictionStore, StoredStream

FOLDER = "teacher_log_probs"
_READ = ("input_tokens", "positions", "segment_ids")


def read_columns(batch: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the names of the columns that a teacher reads: of the decoder and, where there is one, of the encoder."""
    names = [f"{part}_{name}" for part in ("decoder", "encoder") for name in _READ]
    return [name for name in names if name in batch]


def row_digests(batch: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the digest of each row, as hexadecimal text."""
    columns = [np.ascontiguousarray(batch[name], np.int32) for name in read_columns(batch)]
    rows = [b"".join(map(np.ndarray.tobytes, row)) for row in zip(*columns, strict=True)]
    return [hashlib.blake2b(row, digest_size=16).hexdigest() for row in rows]


def shape_of(length: int, top_k: int) -> tuple[int, int]:
    """Returns the shape of a row's value: per position K ids (exact in float32 below 2^24) and K + 1 log-probabilities."""
    return length, 2 * top_k + 1


class TaughtStream(StoredStream):
    """A stream of packed tokens with the additional columns of a teacher.

    The columns are 'teacher_ids' [B, T, K] and 'teacher_log_probs' [B, T, K + 1].

    Args:
      stream, store, teacher: see `StoredStream`.
      top_k: K.
    """

    role = "teacher"

    def __init__(self, stream: Any, store: PredictionStore, *, top_k: int, teacher: str):
        super().__init__(stream, store, teacher)
        self._top_k = top_k

    def columns(self, batch, step, lo, hi):
        values = self._store.get(row_digests(batch))
        return {
            "teacher_ids": values[..., : self._top_k].astype(np.int32),
            "teacher_log_probs": values[..., self._top_k :],
        }
