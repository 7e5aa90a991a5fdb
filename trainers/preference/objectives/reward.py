"""Reward modelling: learns rewards of whole texts from pairs with a preferred text.

Shapes: B rows, T length, K pairs of a row, S = 2 K texts of a row, P = B K pairs of a batch.
"""

from typing import Any

import jax.numpy as jnp
from jax.nn import log_sigmoid

from espalier.common.ranges import Count, NonNegative
from espalier.trainers.objectives.base import LossOut, Objective, loss_in
from espalier.trainers.objectives.forward import Forward, forward_objective, source_losses
from espalier.trainers.objectives.settings import check_not_negative
from espalier.trainers.preference.losses.pairs import by_completion

ENDS = "decoder_ends"


@loss_in("nats per pair")
def bradley_terry(*, model: Any, num_sources: Count = 0, center: NonNegative = 0.0) -> Objective:
    """-log sigma(r_w - r_l - margin) + center (r_w + r_l)^2, averaged over pairs.

    r is the reward of prompt and completion, the model's output at the last token (EOS). The first term is the
    Bradley-Terry loss, with the margin of Llama 2 (arXiv 2307.09288, eq. 2) if the data have one. The second term (arXiv
    2312.09244) centres rewards around 0; the first depends only on differences. Both are as in TRL (RewardTrainer, 1.16).

    Metrics, means over pairs: 'loss' with both terms, 'accuracy', 'margin' (r_w - r_l), 'reward/chosen' and
    'reward/rejected'.

    Args:
      model: a `model.heads.reward_model.RewardModel`.
      num_sources: see `preference`.
      center: weight of the second term; 0.01 is usual, 0 turns it off.
    """
    check_not_negative(center=center)

    def loss_fn(out: Forward, extras: Any) -> LossOut:
        del extras
        batch = out.batch
        if ENDS not in batch:
            raise ValueError(
                f"The batches have no column {ENDS!r} with the last tokens of completions: bind "
                "read_last = True of data.preference.stream.make_stream, as methods/preference/reward_model.gin does."
            )
        chosen_rejected_P2 = by_completion(batch, out.output, ENDS).reshape(-1, 2)
        chosen_P, rejected_P = chosen_rejected_P2[:, 0], chosen_rejected_P2[:, 1]
        weights_P = batch["pair_weights"].reshape(-1)
        margin_P = chosen_P - rejected_P
        required_P = batch["pair_margins"].reshape(-1) if "pair_margins" in batch else 0.0
        loss_P = -log_sigmoid(margin_P - required_P) + center * (chosen_P + rejected_P) ** 2
        loss_P = jnp.where(weights_P > 0, loss_P, 0.0)
        weight = weights_P.sum()
        means = {
            "loss": loss_P,
            "accuracy": (margin_P > 0).astype(jnp.float32),
            "margin": margin_P,
            "reward/chosen": chosen_P,
            "reward/rejected": rejected_P,
        }
        metrics = {name: ((value * weights_P).sum(), weight) for name, value in means.items()}
        metrics |= source_losses(batch, loss_P, weights_P, num_sources)
        return out.loss_out(loss_P.sum(), weight, metrics)

    return forward_objective(model, loss_fn, method=None)
