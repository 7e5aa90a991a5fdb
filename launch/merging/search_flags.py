"""The flags of `launch.merge search`."""

import dataclasses
from collections.abc import Sequence
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchFlags:
    """Flags of `launch.merge search`.

    Attributes:
      models: NAME=DIR of each run.
      held_out: NAME=FILE of each domain.
      out: folder of trials.jsonl, merge.yml and search.json.
      method: how weights are proposed.
      budget: largest number of trials of the search; equal weights, models alone and the table take a few more.
      seed: of random weights.
      delta: how much worse than the best the worst domain may be, as a share of the loss of the best single model there; by
        default its standard error.
      params: see launch.score.
      batch_size: rows at a time.
    """

    models: Sequence[str]
    held_out: Sequence[str]
    out: str
    method: Literal["coordinate", "random"] = "coordinate"
    budget: int = 60
    seed: int = 0
    delta: float | None = None
    params: Literal["auto", "raw", "ema"] = "auto"
    batch_size: int = 8
