"""Ends rows of a batch by a function that sees their tokens while they are generated."""

from collections.abc import Callable, Sequence

import numpy as np

# (prompt, sample, new tokens since the last call) -> number of these to keep if the row ends there, else None.
Watch = Callable[[int, int, Sequence[int]], int | None]


class Watched:
    """Calls a watch with the new tokens of one batch, and records the rows that it has ended.

    Args:
      watch: called for every row that has new tokens; None does not end rows.
      batch: the index of each prompt. The `samples` rows of a prompt are adjacent; rows that fill the batch are last.
      samples: number of rows of each prompt.

    Attributes:
      lengths: number of tokens of each row that the watch has ended, by row.
    """

    def __init__(self, watch: Watch | None, batch: Sequence[int], samples: int):
        self._watch = watch
        self._rows = [(i, sample) for i in batch for sample in range(samples)]
        self._shown = [0] * len(self._rows)
        self.lengths: dict[int, int] = {}

    def look(self, tokens_RM: np.ndarray, counts_R: np.ndarray) -> np.ndarray:
        """Passes new tokens to the watch; returns whether each row has ended, [R]."""
        if self._watch is not None:
            for r, (i, sample) in enumerate(self._rows):
                shown, count = self._shown[r], int(counts_R[r])
                if r in self.lengths or shown == count:
                    continue
                keep = self._watch(i, sample, tokens_RM[r, shown:count].tolist())
                self._shown[r] = count
                if keep is not None:
                    self.lengths[r] = shown + keep
        return np.isin(np.arange(len(counts_R)), list(self.lengths))
