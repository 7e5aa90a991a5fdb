"""The interface of rewards of completions, for best-of-n, indicators and online methods."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from espalier.model.axes import Rules


@dataclasses.dataclass(frozen=True)
class Completion:
    """A completion of a prompt, the input of a reward.

    Attributes:
      prompt: token ids.
      tokens: ids of the completion, without its end token.
      ended: whether it ended with an end token; otherwise it was cut at the maximum length.
      info: other columns of the prompt's row, for verifiers, or None.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    ended: bool
    info: Any = None


class Reward(Protocol):
    """A function of N completions that returns a finite float32 reward for each, [N]; larger is better.

    Equal completions have equal rewards in every call.
    """

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        """Returns finite rewards, float32 [N]."""


@runtime_checkable
class StoredReward(Protocol):
    """A reward whose parameters are restored from disk once the run has a mesh."""

    def on(
        self, mesh: Mesh, rules: Rules, *, meta: Mapping[str, Any], folder: str | os.PathLike
    ) -> Reward:
        """Returns the reward, to be called within the mesh; raises the errors of reading a checkpoint.

        `meta` has the facts of the run's data for `FrozenCheckpoint.check`; `folder` of the run records the checkpoint's step.
        """


def on_mesh(reward: Reward | StoredReward, mesh: Mesh, rules: Rules, **run: Any) -> Reward:
    """Returns the reward, restored onto the mesh if it is a `StoredReward`; `run` is as in `StoredReward.on`."""
    return reward.on(mesh, rules, **run) if isinstance(reward, StoredReward) else reward


def finite_rewards(
    reward: Reward, completions: Sequence[Completion], *, macro: str = "REWARD"
) -> np.ndarray:
    """Returns the rewards of completions, float32 [N].

    Raises:
      ValueError: the reward does not return one finite number per completion; the message names the macro.
    """
    rewards_N = np.asarray(reward(completions), np.float32)
    if rewards_N.shape != (len(completions),) or not np.isfinite(rewards_N).all():
        raise ValueError(
            f"{macro} returned values of shape {rewards_N.shape} for {len(completions)} completions, or some that are not "
            "finite: a reward must return one finite number for each."
        )
    return rewards_N
