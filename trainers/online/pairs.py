"""Online preference learning: the best and the worst of several samples of a prompt form a pair.

Shapes: P prompts, one row for each, G samples of each, R = P G completions, L length.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from espalier.common.ranges import NonNegative, Size
from espalier.trainers import inputs
from espalier.trainers.objectives.settings import check_not_negative
from espalier.trainers.online.method import REFERENCE, Arrays, Method, Samples, Score, float_columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestAndWorst(Method):
    """Pairs for preference losses: online DPO (arXiv 2402.04792), from two samples of a prompt, or the best and the worst of more.

    The sample with the largest reward is chosen, the first of equals; the one with the smallest is rejected, the last of
    equals. Batches have the columns of
    `trainers.inputs.PackedPairs` with one pair per row, the reference's log-probabilities if `reference`, and 'rewards'
    and 'ended' [P, 2] of chosen and rejected, and 'mean_reward' [P] of all samples.

    Attributes:
      prompt_length, completion_length: see `Method`.
      samples: G, at least 2.
      gap: pairs whose rewards differ by no more have weight 0; None to train on all pairs.
      reference: whether batches contain the reference's log-probabilities; some losses need none.
    """

    samples: Size = 2
    gap: NonNegative | None = None
    reference: bool = True
    updates: Size = dataclasses.field(default=1, init=False)
    texts_per_row: ClassVar[Size] = 2
    loss_per = "pairs"

    def __post_init__(self):
        if self.samples < 2:
            raise ValueError(f"SAMPLES = {self.samples}: a pair needs 2 samples or more.")
        if self.gap is not None:
            check_not_negative(gap=self.gap)
        super().__post_init__()

    @property
    def rows_per_prompt(self) -> int:
        return 1

    @property
    def scores(self) -> frozenset[str]:
        return frozenset({REFERENCE} if self.reference else ())

    def columns(self, rows: int) -> inputs.Arrays:
        reference = ["reference_log_probs"] if self.reference else []
        return {
            **float_columns((rows, 1), "pair_weights"),
            **float_columns((rows,), "chosen_tokens_per_pair", "mean_reward"),
            **float_columns((rows, 2), "rewards", "ended", *reference),
        }

    def batch(self, samples: Samples, score: Score) -> Arrays:
        G = self.samples
        # argmax and argmin return the first of equals.
        chosen_P = np.argmax(samples.rewards_PG, axis=1)
        rejected_P = G - 1 - np.argmin(samples.rewards_PG[:, ::-1], axis=1)
        order_P2 = np.stack([chosen_P, rejected_P], axis=1)
        pairs = [
            [(prompt, samples.completions[G * p + g]) for g in order_P2[p].tolist()]
            for p, prompt in enumerate(samples.prompts)
        ]
        count, lengths_P = len(pairs), np.array([len(pair[0][1]) for pair in pairs])
        rewards_P2 = np.take_along_axis(samples.rewards_PG, order_P2, axis=1)
        trained_P1 = np.ones((count, 1), np.float32)
        if self.gap is not None:
            trained_P1[:, 0] = rewards_P2[:, 0] - rewards_P2[:, 1] > self.gap
        # Without a trained pair there is no mean, and no loss that is divided by it.
        chosen_tokens = max(lengths_P @ trained_P1[:, 0] / max(trained_P1.sum(), 1), 1)
        columns = self.packed(pairs, samples.sources_P) | {
            "pair_weights": trained_P1,
            "chosen_tokens_per_pair": np.full(count, chosen_tokens, np.float32),
            "mean_reward": samples.rewards_PG.mean(axis=1),
            "rewards": rewards_P2,
            "ended": np.take_along_axis(samples.ended_PG, order_P2, axis=1).astype(np.float32),
        }
        if self.reference:
            counted_PL = score(columns)[REFERENCE] * columns["decoder_loss_weights"]
            segments_PL = columns["decoder_segment_ids"]
            sums = [(counted_PL * (segments_PL == side)).sum(1) for side in (1, 2)]
            columns["reference_log_probs"] = np.stack(sums, axis=1)
        return columns
