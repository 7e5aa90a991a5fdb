"""What was read of earlier prompts, for prompts that begin with the same tokens.

The least recently used is dropped where a new one would need more memory than allowed.
"""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


class Prefixes:
    """Values of prompts, such as their key/value caches.

    Args:
      most_bytes: bytes that the arrays of all values may have together; a value that has more by itself is not kept.

    Attributes:
      size: bytes of the arrays of all values that are kept.
    """

    def __init__(self, most_bytes: int):
        self._most_bytes, self.size = most_bytes, 0
        # Tokens, value and bytes of each prompt, by its tokens; the least recently used comes first.
        self._kept: collections.OrderedDict[bytes, tuple[np.ndarray, Any, int]]
        self._kept = collections.OrderedDict()

    def longest(self, prompt: Sequence[int]) -> tuple[int, Any, bool]:
        """Returns what shares most first tokens with a prompt: their number, 0 without, the value, and whether the prompts are equal."""
        tokens = np.asarray(prompt, np.int32)
        equal = (name := tokens.tobytes()) in self._kept
        if not equal:
            shared = {name: _shared(tokens, kept) for name, (kept, _, _) in self._kept.items()}
            name = max(shared, key=shared.__getitem__, default=b"")
        if not (count := len(tokens) if equal else shared.get(name, 0)):
            return 0, None, False
        self._kept.move_to_end(name)
        return count, self._kept[name][1], equal

    def add(self, prompt: Sequence[int], value: Any) -> None:
        """Keeps the value of a prompt, instead of those of prompts that it begins with."""
        tokens = np.asarray(prompt, np.int32)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(value))
        if size > self._most_bytes:
            return
        for name, (kept, _, _) in list(self._kept.items()):
            if _shared(tokens, kept) == len(kept):
                self._drop(name)
        while self.size + size > self._most_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[tokens.tobytes()] = tokens, value, size
        self.size += size

    def _drop(self, name: bytes) -> None:
        self.size -= self._kept.pop(name)[2]


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Returns the number of equal first tokens."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
