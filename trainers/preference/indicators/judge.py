"""Rewards of a policy's outputs, and how they do against a competitor's. Shape: N prompts."""

from collections.abc import Sequence

import numpy as np

from trainers.preference.indicators import measures
from trainers.rewards.base import Completion, Reward


class Judge:
    """One reward for the policy and its competitor, of whose outputs there is one for each prompt.

    Args:
      reward: judges outputs.
      competing: the competitor's; None for the first that the policy is judged by.
    """

    def __init__(self, reward: Reward, competing: Sequence[Completion] | None):
        self._reward = reward
        self._competing_N = None if competing is None else self.rewards(competing)

    def rewards(self, outputs: Sequence[Completion]) -> np.ndarray:
        """float32 [N].

        Raises:
          ValueError: the reward gives other than one finite number for each.
        """
        rewards_N = np.asarray(self._reward(outputs), np.float32)
        if rewards_N.shape != (len(outputs),) or not np.isfinite(rewards_N).all():
            raise ValueError(
                f"INDICATORS_REWARD gave values of shape {rewards_N.shape} for {len(outputs)} outputs, or some that "
                "are not finite: a reward is one finite number for each."
            )
        return rewards_N

    def win_probability(self, rewards_N: np.ndarray) -> float:
        """P_win of outputs with these rewards; those of the first call compete where nothing else does."""
        if self._competing_N is None:
            self._competing_N = rewards_N
        return measures.win_probability(rewards_N, self._competing_N)
