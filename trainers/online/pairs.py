"""Online preference learning: the better and the worse of two samples of a prompt form a pair.

Shapes: P prompts, one row for each, R = 2 P completions, L length.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from model.ranges import Size
from trainers import inputs
from trainers.online.method import REFERENCE, Arrays, Method, Samples, Score, float_columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfTwo(Method):
    """Pairs for preference losses: online DPO (arXiv 2402.04792).

    The sample with the larger reward is chosen, the first one if they are equal. Batches have the columns of
    `trainers.inputs.PackedPairs` with one pair per row, the reference's log-probabilities if `reference`, and 'rewards'
    and 'ended' [P, 2] of chosen and rejected.

    Attributes:
      prompt_length, completion_length: see `Method`.
      reference: whether batches contain the reference's log-probabilities; some losses need none.
    """

    reference: bool = True
    samples: Size = dataclasses.field(default=2, init=False)
    updates: Size = dataclasses.field(default=1, init=False)
    texts_per_row: ClassVar[Size] = 2
    loss_per = "pairs"

    @property
    def scores(self) -> frozenset[str]:
        return frozenset({REFERENCE} if self.reference else ())

    def columns(self, rows: int) -> inputs.Arrays:
        reference = ["reference_log_probs"] if self.reference else []
        return {
            **float_columns((rows, 1), "pair_weights"),
            **float_columns((rows,), "chosen_tokens_per_pair"),
            **float_columns((rows, 2), "rewards", "ended", *reference),
        }

    def batch(self, samples: Samples, score: Score) -> Arrays:
        # If rewards are equal, argmax returns the first.
        chosen_P = np.argmax(samples.rewards_PG, axis=1)
        order_P2 = np.stack([chosen_P, 1 - chosen_P], axis=1)
        pairs = [
            [(prompt, samples.completions[2 * p + g]) for g in order_P2[p].tolist()]
            for p, prompt in enumerate(samples.prompts)
        ]
        count, chosen_tokens = len(pairs), sum(len(pair[0][1]) for pair in pairs)
        columns = inputs.pack(pairs, samples.sources_P, length=self.length) | {
            "pair_weights": np.ones((count, 1), np.float32),
            "chosen_tokens_per_pair": np.full(count, chosen_tokens / count, np.float32),
            "rewards": np.take_along_axis(samples.rewards_PG, order_P2, axis=1),
            "ended": np.take_along_axis(samples.ended_PG, order_P2, axis=1).astype(np.float32),
        }
        if self.reference:
            counted_PL = score(columns)[REFERENCE] * columns["decoder_loss_weights"]
            segments_PL = columns["decoder_segment_ids"]
            sums = [(counted_PL * (segments_PL == side)).sum(1) for side in (1, 2)]
            columns["reference_log_probs"] = np.stack(sums, axis=1)
        return columns
