"""Preference learning from pairs that the policy has just sampled: the losses of pairs, and what the samples were worth."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from model.kernels.cross_entropy import Implementation
from trainers.objectives.base import Batch, LossOut, Objective
from trainers.preference.objectives.preference import PairLoss, preference


def online_preference(
    *,
    model: Any,
    losses: Sequence[PairLoss],
    weights: Sequence[float] | None = None,
    num_sources: int = 0,
    implementation: Implementation = "auto",
) -> Objective:
    """`preference` over batches of `trainers.online.pairs.BestOfTwo`, whose reference is a column of theirs.

    Further metrics: 'reward', the mean over both samples, 'reward/margin' between them, and 'reward/ended', the share
    of samples that ended by themselves.
    """
    offline = preference(
        model=model,
        losses=losses,
        weights=weights,
        num_sources=num_sources,
        implementation=implementation,
    )

    def loss_fn(params: Any, batch: Batch, rng: jax.Array | None, **given: Any) -> LossOut:
        out = offline.loss_fn(params, batch, rng, **given)
        rewards_B2, ended_B2 = batch["rewards"], batch["ended"]
        metrics = {
            "reward": (rewards_B2.sum() / 2, out.weight),
            "reward/margin": ((rewards_B2[:, 0] - rewards_B2[:, 1]).sum(), out.weight),
            "reward/ended": (ended_B2.sum() / 2, out.weight),
        }
        return dataclasses.replace(out, metrics=out.metrics | metrics)

    return Objective(loss_fn=loss_fn)
