"""PPO: a critic estimates the value of every token. Shapes: R rows, one completion in each, L length."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from espalier.common.ranges import Fraction, NonNegative, Size
from espalier.trainers import inputs
from espalier.trainers.objectives.settings import check_not_negative
from espalier.trainers.online import losses
from espalier.trainers.online.method import (
    LOG_PROBS,
    REFERENCE,
    VALUES,
    Arrays,
    Method,
    Samples,
    Score,
    float_columns,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Valued(Method):
    """Batches for `trainers.online.policy_gradient.actor_critic`, with an advantage for each token.

    A token's reward is -kl (log p - log q), with p by the policy and q by the reference. The completion's reward is
    added at its last token (InstructGPT, arXiv 2203.02155, eq. 2). Advantages are generalised advantage estimates,
    whitened over the batch.

    Columns besides tokens: 'advantages', 'returns', 'old_values' and 'old_log_probs' [R, L], 'rewards' and 'ended' [R].

    Attributes:
      prompt_length, completion_length, samples, updates: see `Method`.
      kl: weight of the divergence from the reference; with 0 no reference is needed.
      gamma, decay: see `losses.generalised_advantages`.
    """

    updates: Size = 4
    kl: NonNegative = 0.05
    gamma: Fraction = 1.0
    decay: Fraction = 0.95

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(kl=self.kl)
        for name in ("gamma", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be in [0, 1].")

    @property
    def scores(self) -> frozenset[str]:
        return frozenset({LOG_PROBS, VALUES} | ({REFERENCE} if self.kl else set()))

    def columns(self, rows: int) -> inputs.Arrays:
        per_token = ("advantages", "returns", "old_values", "old_log_probs")
        return {
            **float_columns((rows, self.targets_length), *per_token),
            **float_columns((rows,), "rewards", "ended"),
        }

    def batch(self, samples: Samples, score: Score) -> Arrays:
        columns = self.one_in_a_row(samples)
        scores, mask_RL = score(columns), columns["decoder_loss_weights"]
        rewards_RL = np.zeros_like(mask_RL)
        if self.kl:
            rewards_RL -= self.kl * (scores[LOG_PROBS] - scores[REFERENCE]) * mask_RL
        last_R = mask_RL.shape[1] - 1 - np.argmax(mask_RL[:, ::-1], axis=1)
        rewards_RL[np.arange(len(last_R)), last_R] += columns["rewards"]
        values_RL = scores[VALUES] * mask_RL
        arrays = [jnp.asarray(array) for array in (rewards_RL, values_RL, mask_RL)]
        advantages_RL = losses.generalised_advantages(*arrays, gamma=self.gamma, decay=self.decay)
        return {
            **columns,
            "advantages": np.asarray(losses.whitened(advantages_RL, arrays[-1])),
            "returns": np.asarray(advantages_RL + values_RL),
            "old_values": values_RL,
            "old_log_probs": scores[LOG_PROBS],
        }
