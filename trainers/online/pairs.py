"""Online preference learning: the better and the worse of two samples of each prompt as a pair.

Shapes: P prompts, R = 2 P completions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from trainers.inputs import Arrays as Abstract
from trainers.inputs import PackedTokens
from trainers.online import rows
from trainers.online.method import REFERENCE, Samples, Score, check_sizes, row_length
from trainers.online.rows import Arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfTwo:
    """Pairs for the losses of preferences: online DPO (arXiv 2402.04792).

    The sample with the larger reward is chosen, the first of equals. Batches are those of
    `trainers.inputs.PackedPairs`, one pair in a row, with a reference's log-probabilities and the columns 'rewards' and
    'ended' [B, 2] of chosen and rejected.

    Attributes:
      prompt_length, completion_length: see trainers/online/method.py.
      reference: whether a reference's log-probabilities are asked for; losses without one need none.
    """

    prompt_length: int
    completion_length: int
    reference: bool = True
    unit: str = dataclasses.field(default="tokens", init=False)
    loss_per: str = dataclasses.field(default="pairs", init=False)
    samples: int = dataclasses.field(default=2, init=False)
    rows_per_prompt: int = dataclasses.field(default=1, init=False)
    updates: int = dataclasses.field(default=1, init=False)

    def __post_init__(self):
        check_sizes(prompt_length=self.prompt_length, completion_length=self.completion_length)

    @property
    def length(self) -> int:
        return 2 * row_length(self.prompt_length, self.completion_length)

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({REFERENCE} if self.reference else ())

    def arrays(self, rows_: int) -> Abstract:
        one = jax.ShapeDtypeStruct((rows_, 1), jnp.float32)
        both = jax.ShapeDtypeStruct((rows_, 2), jnp.float32)
        return {
            **PackedTokens(self.length).arrays(rows_),
            "pair_weights": one,
            "chosen_tokens_per_pair": jax.ShapeDtypeStruct((rows_,), jnp.float32),
            "rewards": both,
            "ended": both,
            **({"reference_log_probs": both} if self.reference else {}),
        }

    def init_arguments(self) -> tuple[jax.Array, ...]:
        return PackedTokens(self.length).init_arguments()

    def batch(self, samples: Samples, score: Score) -> Arrays:
        # Of equals argmax takes the first.
        chosen_P = np.argmax(samples.rewards_PG, axis=1)
        order_P2 = np.stack([chosen_P, 1 - chosen_P], axis=1)
        pairs = [
            [(prompt, samples.completions[2 * p + g]) for g in order]
            for p, (prompt, order) in enumerate(
                zip(samples.prompts, order_P2.tolist(), strict=True)
            )
        ]
        found = rows.packed(pairs, samples.sources_P, length=self.length)
        chosen_tokens = sum(len(pair[0][1]) for pair in pairs)
        count = len(pairs)
        found |= {
            "pair_weights": np.ones((count, 1), np.float32),
            "chosen_tokens_per_pair": np.full(count, chosen_tokens / count, np.float32),
            "rewards": np.take_along_axis(samples.rewards_PG, order_P2, axis=1),
            "ended": np.take_along_axis(samples.ended_PG, order_P2, axis=1).astype(np.float32),
        }
        if self.reference:
            counted_PL = score(found)[REFERENCE] * found["decoder_loss_weights"]
            segments_PL = found["decoder_segment_ids"]
            sums = [(counted_PL * (segments_PL == side)).sum(1) for side in (1, 2)]
            found["reference_log_probs"] = np.stack(sums, axis=1)
        return found
