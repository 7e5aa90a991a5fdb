"""Looks at rows of tokens while they are generated, and ends those that are to end.

Shapes: R rows, M new tokens at most.
"""

from collections.abc import Callable, Sequence

import numpy as np

# (prompt, sample, its tokens since the last look) -> how many of them to keep, if the row ends there.
Watch = Callable[[int, int, Sequence[int]], int | None]


class Watched:
    """Keeps what a watch has seen of the rows of one batch.

    Args:
      watch: called for every row that has new tokens; None to let all run.
      batch: the index of each prompt; `samples` rows for each are followed by rows that only fill up.
      samples: rows of each prompt.

    Attributes:
      kept: tokens of the rows that a watch has ended.
    """

    def __init__(self, watch: Watch | None, batch: Sequence[int], samples: int):
        self._watch = watch
        self._rows = [(i, sample) for i in batch for sample in range(samples)]
        self._shown = [0] * len(self._rows)
        self.kept: dict[int, int] = {}

    def look(self, tokens_RM: np.ndarray, counts_R: np.ndarray) -> np.ndarray:
        """Shows new tokens; returns which rows have been ended by now, [R]."""
        if self._watch is not None:
            for r, (i, sample) in enumerate(self._rows):
                shown, count = self._shown[r], int(counts_R[r])
                if r in self.kept or shown == count:
                    continue
                keep = self._watch(i, sample, tokens_RM[r, shown:count].tolist())
                self._shown[r] = count
                if keep is not None:
                    self.kept[r] = shown + keep
        return np.isin(np.arange(len(counts_R)), list(self.kept))
