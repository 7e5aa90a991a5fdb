"""Policy-gradient objectives on completions that the policy sampled. Shapes: B rows, T length.

Batches come from `trainers.online.groups` and `trainers.online.critic`, with one completion per row. All log-probabilities
are those of the distribution that the completions are drawn from: softmax(logits / temperature). It has no dropout, so a
policy with dropout is refused.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from espalier.common.ranges import Count, NonNegative, Positive
from espalier.model.kernels.cross_entropy import Implementation
from espalier.trainers.objectives.base import Batch, LossOut, Metrics, Objective, loss_in
from espalier.trainers.objectives.forward import Forward, forward_objective
from espalier.trainers.objectives.settings import check_not_negative, check_positive
from espalier.trainers.online.losses import PolicyLoss, PolicyTokens, k3, ppo, value_loss


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PolicyGradient(Objective):
    """An objective that learns from the probabilities of its own samples.

    Attributes:
      temperature: divides the logits in every log-probability; `Rollouts` must sample with it.
    """

    temperature: float = 1.0


@loss_in("per token")
def policy_gradient(
    *,
    model: Any,
    loss: PolicyLoss,
    num_sources: Count = 0,
    temperature: Positive = 1.0,
    implementation: Implementation = "auto",
) -> PolicyGradient:
    """Returns a policy-gradient objective that uses the batch's advantages.

    A batch without 'old_log_probs' is used for one update, by the policy that sampled it. Its ratio is then 1, with the
    gradient of log p.

    Metrics: means over completions 'reward' (after the penalty for missing ends), 'reward/ended' (the share that
    ended with an end token) and 'reward/tokens'; means over tokens 'ratio' and, with a reference, 'kl' (estimated by
    `losses.k3`); and 'loss'.

    Args:
      model: a language model.
      loss: a function from trainers/online/losses.py.
      num_sources: ignored: rewards are not losses.
      temperature: that of the samples.
      implementation: form of the cross-entropy, see model/kernels/cross_entropy.py.
    """
    del num_sources

    def loss_fn(out: Forward, extras: Any) -> LossOut:
        del extras
        batch = out.batch
        log_probs_BT = out.log_probs_BT(temperature=temperature, implementation=implementation)
        tokens = _tokens(batch, log_probs_BT)
        total, weight = loss(tokens)
        return out.loss_out(total, weight, {"loss": (total, weight), **_metrics(batch, tokens)})

    return _of_samples(forward_objective(model, loss_fn, noise=False), temperature)


@loss_in("per token")
def actor_critic(
    *,
    model: Any,
    num_sources: Count = 0,
    clip: Positive = 0.2,
    value_clip: Positive = 0.2,
    value_weight: NonNegative = 0.1,
    temperature: Positive = 1.0,
    implementation: Implementation = "auto",
) -> PolicyGradient:
    """Returns the objective of PPO: the clipped policy loss plus the clipped squared error of the values, per token.

    Metrics besides those of `policy_gradient`: 'value_loss', before its weight, and 'value'.

    Args:
      model: a `model.heads.actor_critic.ActorCritic`.
      num_sources, temperature, implementation: see `policy_gradient`.
      clip: largest distance of the ratio from 1.
      value_clip: largest change of a value since its tokens were sampled.
      value_weight: weight of the error of the values.
    """
    del num_sources
    check_positive(clip=clip, value_clip=value_clip)
    check_not_negative(value_weight=value_weight)

    def loss_fn(out: Forward, extras: Any) -> LossOut:
        del extras
        batch = out.batch
        log_probs_BT = out.log_probs_BT(temperature=temperature, implementation=implementation)
        tokens = _tokens(batch, log_probs_BT)
        values_BT = out.apply("values", out.output.hidden_BTD)
        policy, weight = ppo(tokens, clip=clip)
        errors_BT = value_loss(values_BT, batch["old_values"], batch["returns"], clip=value_clip)
        error = (errors_BT * tokens.mask).sum()
        metrics = {
            "loss": (policy, weight),
            "value_loss": (error, weight),
            "value": ((values_BT * tokens.mask).sum(), weight),
            **_metrics(batch, tokens),
        }
        return out.loss_out(policy + value_weight * error, weight, metrics)

    return _of_samples(forward_objective(model, loss_fn, noise=False), temperature)


def _of_samples(objective: Objective, temperature: float) -> PolicyGradient:
    check_positive(temperature=temperature)
    return PolicyGradient(loss_fn=objective.loss_fn, temperature=temperature)


def _tokens(batch: Batch, log_probs_BT: jax.Array) -> PolicyTokens:
    mask_BT = batch["decoder_loss_weights"].astype(jnp.float32)
    advantages = batch["advantages"]
    if advantages.ndim == 1:
        advantages = advantages[:, None] * mask_BT
    own_BT = jax.lax.stop_gradient(log_probs_BT)
    return PolicyTokens(
        log_probs=log_probs_BT,
        old_log_probs=batch.get("old_log_probs", own_BT),
        advantages=advantages,
        mask=mask_BT,
        reference_log_probs=batch.get("reference_log_probs"),
    )


def _metrics(batch: Batch, tokens: PolicyTokens) -> Metrics:
    rows = jnp.ones_like(batch["rewards"])
    count_B, weight = tokens.mask.sum(-1), tokens.mask.sum()
    per_row = {"reward": batch["rewards"], "reward/ended": batch["ended"], "reward/tokens": count_B}
    metrics = {name: (value.sum(), rows.sum()) for name, value in per_row.items()}
    ratio_BT = jnp.exp(tokens.log_probs - tokens.old_log_probs)
    metrics["ratio"] = ((ratio_BT * tokens.mask).sum(), weight)
    if tokens.reference_log_probs is not None:
        estimate_BT = k3(tokens.log_probs, tokens.reference_log_probs)
        metrics["kl"] = ((estimate_BT * tokens.mask).sum(), weight)
    return jax.tree.map(jax.lax.stop_gradient, metrics)
