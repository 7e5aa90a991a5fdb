"""Single samples whose tokens a critic values: PPO. Shapes: R rows, one of each prompt or more, L length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from trainers.inputs import Arrays as Abstract
from trainers.inputs import PackedTokens
from trainers.online import losses, rows
from trainers.online.groups import one_in_a_row
from trainers.online.method import (
    LOG_PROBS,
    REFERENCE,
    VALUES,
    Samples,
    Score,
    check_sizes,
    row_length,
)
from trainers.online.rows import Arrays
from trainers.preference.losses.settings import check_not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class Valued:
    """Rows for `trainers.online.policy_gradient.actor_critic`, with advantages of every token.

    A token's reward is -kl (log p - log q), q the reference's, and the last one of a completion has the completion's
    reward too (InstructGPT, arXiv 2203.02155, eq. 2); advantages are generalised ones, whitened over the batch.

    Columns beside tokens: 'advantages', 'returns', 'old_values' and 'old_log_probs' [R, L], 'rewards' and 'ended' [R].

    Attributes:
      prompt_length, completion_length, samples, updates: see trainers/online/method.py.
      kl: weight of the divergence from the reference; 0 asks for no reference.
      gamma, decay: of the advantages, see `policy_gradient.generalised_advantages`.
    """

    prompt_length: int
    completion_length: int
    samples: int = 1
    updates: int = 4
    kl: float = 0.05
    gamma: float = 1.0
    decay: float = 0.95
    unit: str = dataclasses.field(default="tokens", init=False)
    loss_per: str = dataclasses.field(default="tokens", init=False)

    def __post_init__(self):
        check_sizes(
            prompt_length=self.prompt_length,
            completion_length=self.completion_length,
            samples=self.samples,
            updates=self.updates,
        )
        check_not_negative(kl=self.kl)
        for name in ("gamma", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be in [0, 1].")

    @property
    def rows_per_prompt(self) -> int:
        return self.samples

    @property
    def length(self) -> int:
        return row_length(self.prompt_length, self.completion_length)

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({LOG_PROBS, VALUES} | ({REFERENCE} if self.kl else set()))

    def arrays(self, rows_: int) -> Abstract:
        per_token = dict.fromkeys(("advantages", "returns", "old_values", "old_log_probs"), True)
        columns = {**per_token, "rewards": False, "ended": False}
        return {
            **PackedTokens(self.length).arrays(rows_),
            **rows.shapes(rows_, self.length, **columns),
        }

    def init_arguments(self) -> tuple[jax.Array, ...]:
        return PackedTokens(self.length).init_arguments()

    def batch(self, samples: Samples, score: Score) -> Arrays:
        found = one_in_a_row(samples, self.length)
        told, mask_RL = score(found), found["decoder_loss_weights"]
        rewards_RL = np.zeros_like(mask_RL)
        if self.kl:
            rewards_RL -= self.kl * (told[LOG_PROBS] - told[REFERENCE]) * mask_RL
        last_R = mask_RL.shape[1] - 1 - np.argmax(mask_RL[:, ::-1], axis=1)
        rewards_RL[np.arange(len(last_R)), last_R] += found["rewards"]
        values_RL = told[VALUES] * mask_RL
        arrays = [jnp.asarray(array) for array in (rewards_RL, values_RL, mask_RL)]
        advantages_RL = losses.generalised_advantages(*arrays, gamma=self.gamma, decay=self.decay)
        return {
            **found,
            "advantages": np.asarray(losses.whitened(advantages_RL, arrays[-1])),
            "returns": np.asarray(advantages_RL + values_RL),
            "old_values": values_RL,
            "old_log_probs": told[LOG_PROBS],
        }
