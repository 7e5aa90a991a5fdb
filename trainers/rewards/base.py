"""The reward seam: what judges completions while a run goes on, as best-of-n, indicators and online methods need."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from trainers.partitioning import Rules


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Attributes:
      prompt: token ids.
      tokens: those of the completion, without the one that ended it.
      ended: whether a token that ends completions came; otherwise it was cut at the longest length.
      info: what the prompt's row says beside its text, for verifiers; None for nothing.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    ended: bool
    info: Any = None


class Reward(Protocol):
    """Judges completions by themselves: one number each, larger is better.

    Rewards of the same completions are the same whenever they are asked for.
    """

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        """float32 [N], finite."""
        ...


@runtime_checkable
class StoredReward(Protocol):
    """A reward whose parameters lie on disk, for runs that have a mesh to put them on."""

    def on(self, mesh: Mesh, rules: Rules) -> Reward:
        """The reward, to be asked within the mesh; raises what reading a checkpoint does."""
        ...
