"""Preference optimisation: losses of log-probabilities of pairs, in one forward pass for both completions.

Shapes: B rows, K pairs of a row, S = 2 K, P = B K pairs of a batch.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from espalier.common.ranges import Count, Fraction, NonNegative
from espalier.model.kernels.cross_entropy import Implementation
from espalier.trainers.objectives.base import Batch, LossOut, Metrics, Objective, loss_in
from espalier.trainers.objectives.forward import Forward, forward_objective, source_losses
from espalier.trainers.objectives.frozen_model import FrozenModel
from espalier.trainers.objectives.own_base import OwnBase
from espalier.trainers.preference.losses.pairs import (
    MissingLabelsError,
    MissingReferenceError,
    PairLogProbs,
    by_completion,
    pairs_of,
    tails_weighted,
    weights_on_policy,
)

# Log-probabilities of P pairs -> losses [P]; the functions are in trainers/preference/losses/.
PairLoss = Callable[[PairLogProbs], jax.Array]


@loss_in("per pair")
def preference(
    *,
    model: Any,
    losses: Sequence[PairLoss],
    weights: Sequence[NonNegative] | None = None,
    num_sources: Count = 0,
    reference: FrozenModel | OwnBase | None = None,
    ld_alpha: Fraction = 1.0,
    on_policy_weights: bool = False,
    implementation: Implementation = "auto",
) -> Objective:
    """The weighted sum of losses of pairs, averaged over pairs.

    Batches have the columns of `trainers.inputs.PackedPairs`. The reference's log-probabilities are a column of the
    batch ('reference_log_probs', see launch/preference/reference.py), or `reference` computes them in the step; both give the
    same values. The reference has no dropout, so a loss that reads them refuses a policy with dropout.

    Metrics, means over pairs:
      'loss', and with several losses 'loss/<name>' of each, before its weight;
      'logps/chosen', 'logps/rejected': log-probabilities, summed over a completion's tokens;
      'llh/chosen', 'llh/rejected', 'llh/gap': the same per token (arXiv 2410.11677, section 3);
      'accuracy': share of pairs whose chosen completion is preferred;
      'policy_weight', with `on_policy_weights`: the weight of a pair;
      'log_ratio/chosen', 'log_ratio/rejected', 'log_ratio/margin', with a reference: the implicit rewards of DPO,
        divided by beta;
      'reward' (mean over both samples), 'reward/margin' (between them) and 'reward/ended' (share of samples that ended
        with an end token), for pairs that the policy sampled (online DPO).

    Args:
      model: a language model, as for `lm.language_modelling`.
      losses: functions from trainers/preference/losses/.
      weights: weights of the losses, at least 0; None for 1 each.
      num_sources: S; with S > 0, metric 'source_loss' is a vector over batch["source_ids"].
      reference: computes the reference's log-probabilities in each step; None if they are in the batch.
      ld_alpha: weight of the log-probabilities of tokens past the length of the pair's shorter completion, for policy
        and reference: LD-DPO (arXiv 2409.06411); 1 is DPO. Metrics use the same weights.
      on_policy_weights: multiply the losses of a pair by how likely the policy samples its completions: WPO (arXiv
        2406.11827), see `pairs.weights_on_policy`. Losses that sort the pairs of a batch (transport.py) are refused.
      implementation: form of the cross-entropy, see model/kernels/cross_entropy.py.
    """
    names, factors, of_single = _checked(losses, weights)
    if on_policy_weights and of_single:
        raise ValueError(
            "on_policy_weights weighs pairs, but LOSSES read single completions: set it to False."
        )
    for name, loss in zip(names, losses, strict=True):
        if on_policy_weights and " sort[" in str(jax.make_jaxpr(loss)(_pair())):
            raise ValueError(
                f"on_policy_weights weighs single pairs, but {name} sorts the pairs of a batch: set it to False."
            )
    if ld_alpha != 1:
        _check_tails(ld_alpha, losses, live=reference is not None, of_single=of_single)

    def loss_fn(out: Forward, extras: Any) -> LossOut:
        batch = out.batch
        if "pair_labels" in batch and not of_single:
            raise ValueError(
                f"The data are single completions with labels (PAIRS_KIND = 'unpaired'), and {', '.join(names)} "
                "compare pairs: set PAIRS_KIND = 'paired', or choose losses of trainers/preference/losses/unpaired.py."
            )
        scored = batch if ld_alpha == 1 else tails_weighted(batch, ld_alpha)
        policy_log_probs_BT = out.log_probs_BT(implementation=implementation)
        sums_BS = by_completion(scored, policy_log_probs_BT)
        if reference is None:  # stored log-probabilities are of whole completions, without ld_alpha
            reference_BS = batch.get("reference_log_probs") if ld_alpha == 1 else None
        else:
            frozen = reference.forward(extras, scored, out.variables["params"])
            log_probs_BT = frozen.log_probs_BT(implementation=implementation)
            reference_BS = by_completion(scored, log_probs_BT)
        pairs = pairs_of(batch, sums_BS, reference_BS)
        present_P = pairs.weights > 0
        values = {
            name: jnp.where(present_P, loss(pairs), 0.0)
            for name, loss in zip(names, losses, strict=True)
        }
        loss_P = jnp.zeros_like(pairs.weights)
        for factor, value in zip(factors, values.values(), strict=True):
            loss_P += factor * value
        weight = pairs.weights.sum()
        weighting: Metrics = {}
        if on_policy_weights:
            policy_P = pairs.weights * weights_on_policy(
                batch, policy_log_probs_BT, out.log_collisions_BT()
            )
            loss_P *= policy_P
            weighting["policy_weight"] = (policy_P.sum(), weight)
        metrics = {"loss": (loss_P.sum(), weight), **_metrics(pairs), **weighting}
        if "rewards" in batch:
            metrics |= _sample_metrics(batch)
        if len(losses) > 1:
            metrics |= {f"loss/{name}": (value.sum(), weight) for name, value in values.items()}
        metrics |= source_losses(batch, loss_P, pairs.weights, num_sources)
        return out.loss_out(loss_P.sum(), weight, metrics)

    noise = not _compare_with_reference(losses)
    return forward_objective(model, loss_fn, stored_extras=reference, noise=noise)


def _metrics(pairs: PairLogProbs) -> Metrics:
    if pairs.labels is not None:
        return _unpaired_metrics(pairs, pairs.labels)
    means = {
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
        "llh/chosen": pairs.chosen_mean,
        "llh/rejected": pairs.rejected_mean,
        "llh/gap": pairs.chosen_mean - pairs.rejected_mean,
    }
    preferred = pairs.chosen_mean > pairs.rejected_mean
    if pairs.ref_chosen is not None:
        means["log_ratio/chosen"] = pairs.chosen_log_ratio
        means["log_ratio/rejected"] = pairs.rejected_log_ratio
        means["log_ratio/margin"] = pairs.margin
        preferred = pairs.margin > 0
    means["accuracy"] = preferred.astype(jnp.float32)
    weight = pairs.weights.sum()
    return {name: ((value * pairs.weights).sum(), weight) for name, value in means.items()}


def _sample_metrics(batch: Batch) -> Metrics:
    """Returns the metrics of pairs that the policy sampled (`trainers.online.pairs.BestAndWorst`), trained on or not."""
    rewards_B2, ended_B2 = batch["rewards"], batch["ended"]
    count = jnp.float32(len(rewards_B2))
    return {
        "reward": (batch["mean_reward"].sum(), count),
        "reward/margin": ((rewards_B2[:, 0] - rewards_B2[:, 1]).sum(), count),
        "reward/ended": (ended_B2.sum() / 2, count),
    }


def _unpaired_metrics(pairs: PairLogProbs, labels: jax.Array) -> Metrics:
    means = {"logps": pairs.chosen, "llh": pairs.chosen_mean}
    if pairs.ref_chosen is not None:
        means["log_ratio"] = pairs.chosen_log_ratio
    kinds = {"desirable": pairs.weights * labels, "undesirable": pairs.weights * (1 - labels)}
    return {
        f"{name}/{kind}": ((value * weights).sum(), weights.sum())
        for name, value in means.items()
        for kind, weights in kinds.items()
    }


def _checked(
    losses: Sequence[PairLoss], weights: Sequence[float] | None
) -> tuple[list[str], list[float], bool]:
    """Returns the losses' names and weights, and whether they are losses of single labelled completions.

    Each loss is traced on one pair, so a wrong setting raises at once.
    """
    if not losses:
        raise ValueError(
            "LOSSES is empty: name functions of trainers/preference/losses/, such as @direct.dpo."
        )
    factors = [1.0] * len(losses) if weights is None else list(weights)
    if len(factors) != len(losses):
        raise ValueError(
            f"LOSS_WEIGHTS = {factors}: give one weight for each of the {len(losses)} LOSSES."
        )
    names: list[str] = []
    of_single = []
    for loss in losses:
        jax.eval_shape(loss, _pair())
        unlabelled = dataclasses.replace(_pair(), labels=None)
        of_single.append(_fails(loss, unlabelled, MissingLabelsError))
        name = getattr(loss, "__name__", type(loss).__name__)
        names.append(name if name not in names else f"{name}_{len(names)}")
    for name, weight in zip(names, factors, strict=True):
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"LOSS_WEIGHTS: the weight of {name} is {weight} and must be finite and not negative (a method may have "
                "a macro for it, such as NLL_WEIGHT)."
            )
    return names, factors, all(of_single)


def _check_tails(
    ld_alpha: float, losses: Sequence[PairLoss], *, live: bool, of_single: bool
) -> None:
    if not 0 <= ld_alpha < 1:
        raise ValueError(f"LD_ALPHA = {ld_alpha} must lie in [0, 1]; 1 is DPO.")
    if of_single:
        raise ValueError(
            f"LD_ALPHA = {ld_alpha} compares the lengths of a pair, but LOSSES read single completions: set it to 1."
        )
    if not live and _compare_with_reference(losses):
        raise ValueError(
            f"LD_ALPHA = {ld_alpha} weighs the reference's tokens too, but the data have only their sums: "
            "give t5x_configs/methods/preference/ld_dpo.gin, whose reference runs in each step."
        )


def _compare_with_reference(losses: Sequence[PairLoss]) -> bool:
    """Returns whether a loss reads the reference's log-probabilities."""
    alone = dataclasses.replace(_pair(), ref_chosen=None)
    return any(_fails(loss, alone, MissingReferenceError) for loss in losses)


def _pair() -> PairLogProbs:
    ones = jnp.ones(1)
    return PairLogProbs(-ones, -ones, ones, ones, ones, jnp.ones(()), -ones, -ones, ones)


def _fails(loss: PairLoss, pair: PairLogProbs, error: type[ValueError]) -> bool:
    """Returns whether a loss raises `error` for a pair without reference or labels."""
    try:
        jax.eval_shape(loss, pair)
    except error:
        return True
    return False
