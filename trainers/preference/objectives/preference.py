"""Preference optimisation: losses of log-probabilities of pairs, in one forward pass for both completions.

Shapes: B rows, K pairs of a row, S = 2 K, P = B K pairs of a batch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from model.kernels.cross_entropy import Implementation
from trainers.objectives.base import Batch, LossOut, Metrics, Objective
from trainers.objectives.forward import forward, source_losses
from trainers.objectives.frozen_model import FrozenModel
from trainers.preference.losses.pairs import MissingLabelsError, MissingReferenceError, PairLogProbs
from trainers.preference.objectives import completions

# Log-probabilities of P pairs -> a value for each; trainers/preference/losses/ has them.
PairLoss = Callable[[PairLogProbs], jax.Array]


def preference(
    *,
    model: Any,
    losses: Sequence[PairLoss],
    weights: Sequence[float] | None = None,
    num_sources: int = 0,
    reference: FrozenModel | None = None,
    ld_alpha: float = 1.0,
    implementation: Implementation = "auto",
) -> Objective:
    """The weighted sum of losses of pairs, averaged over pairs.

    Batches have the columns of `trainers.inputs.PackedPairs`. The log-probabilities of a reference are a column of the
    batch ('reference_log_probs', see launch/run/reference.py) or are computed in the step by `reference`; both are equal.

    Metrics, means over pairs: 'loss'; 'logps/chosen' and 'logps/rejected', sums over a completion's tokens;
    'llh/chosen', 'llh/rejected' and 'llh/gap', the same per token (arXiv 2410.11677, section 3); 'accuracy', the
    share of pairs whose chosen completion is preferred; with a reference 'log_ratio/chosen', 'log_ratio/rejected' and 'log_ratio/margin',
    which times beta are the implicit rewards of DPO. With several losses 'loss/<name>' of each, before its weight. Of
    sampled pairs (online DPO) also 'reward', the mean over both samples, 'reward/margin' between them, and
    'reward/ended', the share of samples that ended by themselves.

    Args:
      model: a decoder-only module, as for `lm.language_modelling`.
      losses: functions of trainers/preference/losses/.
      weights: of the losses, positive; None for 1 each.
      num_sources: S; with S > 0, metric 'source_loss' is a vector over batch["source_ids"].
      reference: computes the reference's log-probabilities in each step; None where they come with the batch.
      ld_alpha: weight of the log-probabilities of tokens past the length of the shorter completion of a pair, policy's
        and reference's: LD-DPO (arXiv 2409.06411), 1 being DPO. Metrics use the same weights.
      implementation: form of the cross-entropy, see model/kernels/cross_entropy.py.

    Raises:
      ValueError: no losses, another number of weights, a negative weight, or an invalid setting.
    """
    names, of_single = _checked(losses, weights)
    if ld_alpha != 1:
        _check_tails(ld_alpha, losses, live=reference is not None, of_single=of_single)
    factors = [1.0] * len(losses) if weights is None else list(weights)

    def loss_fn(
        params: Any,
        batch: Batch,
        rng: jax.Array | None,
        *,
        variables: Mapping[str, Any],
        extras: Any,
    ) -> LossOut:
        if "pair_labels" in batch and not of_single:
            raise ValueError(
                f"The data are single completions with labels (PAIRS_KIND = 'unpaired'), and {', '.join(names)} "
                "compare pairs: set PAIRS_KIND = 'paired', or choose losses of trainers/preference/losses/unpaired.py."
            )
        scored = batch if ld_alpha == 1 else completions.tails_weighted(batch, ld_alpha)
        out = forward(model, params, scored, rng, variables)
        log_probs_BT = out.log_probs_BT(implementation=implementation)
        sums_BS = completions.by_completion(scored, log_probs_BT)
        if reference is None:  # stored ones are of whole completions
            reference_BS = batch.get("reference_log_probs") if ld_alpha == 1 else None
        else:
            frozen = reference.forward(extras, scored)
            log_probs_BT = frozen.log_probs_BT(implementation=implementation)
            reference_BS = completions.by_completion(scored, log_probs_BT)
        pairs = completions.of_batch(batch, sums_BS, reference_BS)
        present_P = pairs.weights > 0
        values = {
            name: jnp.where(present_P, loss(pairs), 0.0)
            for name, loss in zip(names, losses, strict=True)
        }
        loss_P = jnp.zeros_like(pairs.weights)
        for factor, value in zip(factors, values.values(), strict=True):
            loss_P += factor * value
        weight = pairs.weights.sum()
        metrics = {"loss": (loss_P.sum(), weight), **_metrics(pairs)}
        if "rewards" in batch:
            metrics |= _sample_metrics(batch, weight)
        if len(losses) > 1:
            metrics |= {f"loss/{name}": (value.sum(), weight) for name, value in values.items()}
        metrics |= source_losses(batch, loss_P, pairs.weights, num_sources)
        return out.loss_out(loss_P.sum(), weight, metrics)

    return Objective(loss_fn=loss_fn, stored_extras=reference)


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


def _sample_metrics(batch: Batch, weight: jax.Array) -> Metrics:
    """Metrics of pairs that the policy has sampled (`trainers.online.pairs.BestOfTwo`)."""
    rewards_B2, ended_B2 = batch["rewards"], batch["ended"]
    return {
        "reward": (rewards_B2.sum() / 2, weight),
        "reward/margin": ((rewards_B2[:, 0] - rewards_B2[:, 1]).sum(), weight),
        "reward/ended": (ended_B2.sum() / 2, weight),
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


def _checked(losses: Sequence[PairLoss], weights: Sequence[float] | None) -> tuple[list[str], bool]:
    """Names of the losses, and whether all are of single completions with labels.

    Each loss is traced on one pair, so a wrong setting raises at once.
    """
    if not losses:
        raise ValueError(
            "LOSSES is empty: name functions of trainers/preference/losses/, such as @direct.dpo."
        )
    if weights is not None and len(weights) != len(losses):
        raise ValueError(f"LOSS_WEIGHTS = {list(weights)} are not the {len(losses)} of LOSSES.")
    names: list[str] = []
    of_single = []
    for loss in losses:
        jax.eval_shape(loss, _pair())
        unlabelled = dataclasses.replace(_pair(), labels=None)
        of_single.append(_fails(loss, unlabelled, MissingLabelsError))
        name = getattr(loss, "__name__", type(loss).__name__)
        names.append(name if name not in names else f"{name}_{len(names)}")
    for name, weight in zip(names, [1.0] * len(names) if weights is None else weights, strict=True):
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"LOSS_WEIGHTS: the weight of {name} is {weight} and must be finite and not negative (a method may have "
                "a macro for it, such as NLL_WEIGHT)."
            )
    return names, all(of_single)


def _check_tails(
    ld_alpha: float, losses: Sequence[PairLoss], *, live: bool, of_single: bool
) -> None:
    if not 0 <= ld_alpha < 1:
        raise ValueError(f"LD_ALPHA = {ld_alpha} must lie in [0, 1], 1 being DPO's.")
    if of_single:
        raise ValueError(
            f"LD_ALPHA = {ld_alpha} compares the lengths of a pair, and LOSSES are of single completions: set it to 1."
        )
    alone = dataclasses.replace(_pair(), ref_chosen=None)
    if not live and any(_fails(loss, alone, MissingReferenceError) for loss in losses):
        raise ValueError(
            f"LD_ALPHA = {ld_alpha} weighs the reference's tokens too, and those that are stored are added up already: "
            "give t5x_configs/methods/preference/ld_dpo.gin."
        )


def _pair() -> PairLogProbs:
    """One pair to trace a loss on."""
    one = jnp.ones(1)
    return PairLogProbs(-one, -one, one, one, one, jnp.ones(()), -one, -one, one)


def _fails(loss: PairLoss, pair: PairLogProbs, error: type[ValueError]) -> bool:
    """Whether a loss raises `error` for a pair that lacks something."""
    try:
        jax.eval_shape(loss, pair)
    except error:
        return True
    return False
