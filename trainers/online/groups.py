"""RLOO and GRPO: several samples of each prompt, whose rewards are compared within this group.

Shapes: P prompts, G samples of each, R = P G rows, L length.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from espalier.common.ranges import NonNegative, Size
from espalier.trainers import inputs
from espalier.trainers.objectives.settings import check_not_negative
from espalier.trainers.online.method import (
    LOG_PROBS,
    REFERENCE,
    Arrays,
    Method,
    Samples,
    Score,
    float_columns,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups(Method):
    """Batches for `trainers.online.policy_gradient.policy_gradient`, with one completion per row.

    Columns besides tokens: 'advantages', 'rewards' and 'ended' [R]; 'old_log_probs' [R, L] if `updates` > 1;
    'reference_log_probs' [R, L] if `reference`.

    Attributes:
      prompt_length, completion_length, samples, updates: see `Method`.
      advantages: function of rewards [P, G] from trainers/online/losses.py.
      kl: weight of the penalty log p - log q that is subtracted from a completion's reward. p is the probability of the
        whole completion by the policy, q by the reference.
      reference: whether the loss needs the reference's log-probabilities.
    """

    advantages: Callable[[jax.Array], jax.Array]
    samples: Size = 8
    kl: NonNegative = 0.0
    reference: bool = False

    def __post_init__(self):
        if self.samples < 2:
            raise ValueError(
                f"SAMPLES = {self.samples}: a completion is compared with others of its prompt; give 2 or more."
            )
        super().__post_init__()
        check_not_negative(kl=self.kl)

    @property
    def scores(self) -> frozenset[str]:
        own = {LOG_PROBS} if self.updates > 1 or self.kl else set()
        return frozenset(own | ({REFERENCE} if self.reference or self.kl else set()))

    def columns(self, rows: int) -> inputs.Arrays:
        old = ["old_log_probs"] if self.updates > 1 else []
        reference = ["reference_log_probs"] if self.reference else []
        return {
            **float_columns((rows,), "advantages", "rewards", "ended"),
            **float_columns((rows, self.targets_length), *old, *reference),
        }

    def batch(self, samples: Samples, score: Score) -> Arrays:
        columns = self.one_in_a_row(samples)
        scores = score(columns) if self.scores else {}
        rewards_PG = samples.rewards_PG
        if self.kl:
            log_ratio_RL = scores[LOG_PROBS] - scores[REFERENCE]
            divergence_R = (log_ratio_RL * columns["decoder_loss_weights"]).sum(1)
            rewards_PG = rewards_PG - self.kl * divergence_R.reshape(rewards_PG.shape)
        advantages_PG = self.advantages(jnp.asarray(rewards_PG))
        columns["advantages"] = np.asarray(advantages_PG, np.float32).reshape(-1)
        if self.updates > 1:
            columns["old_log_probs"] = scores[LOG_PROBS]
        if self.reference:
            columns["reference_log_probs"] = scores[REFERENCE]
        return columns
