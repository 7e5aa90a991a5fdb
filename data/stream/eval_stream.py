"""The evaluation stream: reads every held-out row of a source once."""

import numpy as np

from data.stream import order, rows
from data.stream.row_stream import RowStream


class EvalStream(RowStream):
    """Reads every row of one source once, in a fixed order.

    Rows that fill the last batch have loss weight 0. See `data.stream.stream.make_eval_stream`.

    Attributes:
        name: name of the source.
        num_steps: number of batches that cover the source.
        bytes_per_token: UTF-8 bytes of text per target token, for bits per byte; 0 if unknown, for
            example where tokens have loss weights.
    """

    def __init__(
        self,
        source: rows.Source,
        *,
        batch_size: int,
        cross_document_attention: bool = False,
        start_token: int | None = 0,
    ):
        super().__init__([source], batch_size, cross_document_attention, start_token)
        self.name = source.name
        self.num_steps = -(-source.plan.num_rows // batch_size)
        self.bytes_per_token = source.bytes_per_token
        self.fingerprint = self._fingerprint(order="permuted")

    def summary(self) -> dict:
        return {**super().summary(), "num_steps": self.num_steps}

    def _locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_range(lo, hi)
        if not 0 <= step < self.num_steps:
            raise ValueError(
                f"{self.name!r} has {self.num_steps} batches; there is no batch {step}."
            )
        place_B = step * self.batch_size + np.arange(lo, hi, dtype=np.int64)
        num_rows = self._sources[0].plan.num_rows
        row_B = np.full_like(place_B, rows.NO_ROW)
        is_row_B = place_B < num_rows
        row_B[is_row_B] = order.permute(
            place_B[is_row_B], num_rows, order.hash64("evaluation", self.name)
        )
        return np.zeros_like(row_B), np.zeros_like(row_B), row_B
