"""Groups of samples of each prompt, whose rewards are compared within the group: RLOO and GRPO.

Shapes: P prompts, G samples of each, R = P G rows, L length.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from trainers.inputs import Arrays as Abstract
from trainers.inputs import PackedTokens
from trainers.online import rows
from trainers.online.method import LOG_PROBS, REFERENCE, Samples, Score, check_sizes, row_length
from trainers.online.rows import Arrays
from trainers.preference.losses.settings import check_not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Rows for `trainers.online.policy_gradient.policy_gradient`, one completion in each.

    Columns beside tokens: 'advantages', 'rewards' and 'ended' [R]; 'old_log_probs' [R, L] where rows are used more
    than once; 'reference_log_probs' [R, L] where `reference` asks for them.

    Attributes:
      prompt_length, completion_length, samples, updates: see trainers/online/method.py.
      advantages: function of rewards [P, G], of trainers/online/losses.py.
      kl: how much log p - log q of a whole completion, q the reference's, is taken off its reward.
      reference: whether the loss reads the reference's log-probabilities.
    """

    prompt_length: int
    completion_length: int
    advantages: Callable[[jax.Array], jax.Array]
    samples: int = 8
    updates: int = 1
    kl: float = 0.0
    reference: bool = False
    unit: str = dataclasses.field(default="tokens", init=False)
    loss_per: str = dataclasses.field(default="tokens", init=False)

    def __post_init__(self):
        check_sizes(
            prompt_length=self.prompt_length,
            completion_length=self.completion_length,
            updates=self.updates,
        )
        check_not_negative(kl=self.kl)
        if self.samples < 2:
            raise ValueError(
                f"SAMPLES = {self.samples}: a completion is compared with others of its prompt; give 2 or more."
            )

    @property
    def rows_per_prompt(self) -> int:
        return self.samples

    @property
    def length(self) -> int:
        return row_length(self.prompt_length, self.completion_length)

    @property
    def asks(self) -> frozenset[str]:
        own = {LOG_PROBS} if self.updates > 1 or self.kl else set()
        return frozenset(own | ({REFERENCE} if self.reference or self.kl else set()))

    def arrays(self, rows_: int) -> Abstract:
        columns = {"advantages": False, "rewards": False, "ended": False}
        columns |= {"old_log_probs": True} if self.updates > 1 else {}
        columns |= {"reference_log_probs": True} if self.reference else {}
        return {
            **PackedTokens(self.length).arrays(rows_),
            **rows.shapes(rows_, self.length, **columns),
        }

    def init_arguments(self) -> tuple[jax.Array, ...]:
        return PackedTokens(self.length).init_arguments()

    def batch(self, samples: Samples, score: Score) -> Arrays:
        found = one_in_a_row(samples, self.length)
        told = score(found) if self.asks else {}
        rewards_PG = samples.rewards_PG
        if self.kl:
            log_ratio_RL = told[LOG_PROBS] - told[REFERENCE]
            away_R = (log_ratio_RL * found["decoder_loss_weights"]).sum(1)
            rewards_PG = rewards_PG - self.kl * away_R.reshape(rewards_PG.shape)
        found["advantages"] = np.asarray(
            self.advantages(jnp.asarray(rewards_PG)), np.float32
        ).reshape(-1)
        if self.updates > 1:
            found["old_log_probs"] = told[LOG_PROBS]
        if self.reference:
            found["reference_log_probs"] = told[REFERENCE]
        return found


def one_in_a_row(samples: Samples, length: int) -> Arrays:
    """Tokens of all completions, with their rewards and whether they ended."""
    copies = samples.rewards_PG.shape[1]
    texts = [
        [(samples.prompts[r // copies], completion)]
        for r, completion in enumerate(samples.completions)
    ]
    return {
        **rows.packed(texts, np.repeat(samples.sources_P, copies), length=length),
        "rewards": samples.rewards_PG.reshape(-1),
        "ended": samples.ended_PG.reshape(-1).astype(np.float32),
    }
