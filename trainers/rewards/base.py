"""The reward seam: rewards of completions, for best-of-n, indicators and online methods."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from trainers.partitioning import Rules


@dataclasses.dataclass(frozen=True)
class Completion:
    """A completion of a prompt, as a reward reads it.

    Attributes:
      prompt: token ids.
      tokens: ids of the completion, without the one that ended it.
      ended: whether it ended by itself; otherwise it was cut at the greatest length.
      info: the row of the prompt besides its text, for verifiers; None for nothing.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    ended: bool
    info: Any = None


class Reward(Protocol):
    """Returns one number for each completion, larger is better; equal completions have equal rewards in every call."""

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        """float32 [N], finite."""
        ...


@runtime_checkable
class StoredReward(Protocol):
    """A reward whose parameters lie on disk until a run has a mesh for them."""

    def on(self, mesh: Mesh, rules: Rules) -> Reward:
        """The reward, to be called within the mesh; raises the errors of reading a checkpoint."""
        ...


def finite_rewards(
    reward: Reward, completions: Sequence[Completion], *, macro: str = "REWARD"
) -> np.ndarray:
    """The rewards of completions, float32 [N].

    Raises:
      ValueError: the reward does not return one finite number for each; names the macro.
    """
    rewards_N = np.asarray(reward(completions), np.float32)
    if rewards_N.shape != (len(completions),) or not np.isfinite(rewards_N).all():
        raise ValueError(
            f"{macro} returned values of shape {rewards_N.shape} for {len(completions)} completions, or some that are not "
            "finite: a reward must return one finite number for each."
        )
    return rewards_N
