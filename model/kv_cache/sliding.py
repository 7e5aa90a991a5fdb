"""A sliding window in all layers during generation, stored in a ring."""

import dataclasses
from typing import Any

from model.kv_cache.full import FullCache, Reading, rolling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sliding(FullCache):
    """Keeps only the last tokens, whatever attention a layer was trained with.

    A generated token sees `window` tokens, itself included, or its layer's window if that is shorter.
    Tokens of the prompt see each other as in training.

    Attributes:
      window: number of tokens that are kept.
    """

    window: int = 4096

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window = {self.window} must be at least 1")

    def most(self, state: Reading) -> int:
        del state
        return self.window

    def keep(self, state: Reading, *, length: int, dtype: Any) -> Any:
        return rolling(state, self.window, length=length, dtype=dtype)
