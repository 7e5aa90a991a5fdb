"""Losses of single completions labelled desirable or undesirable. Shape: P examples; float32 [P], unweighted.

`PairLogProbs.labels` has the labels; `chosen` is the completion of either label, and c its log-ratio. beta and sigma are
as in trainers/preference/losses/direct.py. Formulas are TRL's (KTOTrainer, 1.16).
"""

import jax
import jax.numpy as jnp
from jax.nn import sigmoid

from model.ranges import NonNegative, Positive
from trainers.objectives.settings import check_not_negative, check_positive
from trainers.preference.losses.pairs import MissingLabelsError, PairLogProbs


def kto(
    pairs: PairLogProbs,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> jax.Array:
    """w_D (1 - sigma(beta (c - z_0))) or w_U (1 - sigma(beta (z_0 - c))): KTO (arXiv 2402.01306, eq. 7).

    The first formula is for desirable completions, the second for undesirable ones. z_0 estimates the divergence of the
    policy from its reference. It is the mean log-ratio of completions of other prompts (`pairs.rejected`) over the
    examples of a microbatch, at least 0 and without gradient. Small microbatches give a poor estimate.

    Args:
      pairs: log-probabilities by policy and reference, with labels.
      beta: strength of the penalty on the divergence from the reference.
      desirable_weight: w_D; TRL advises 1 <= w_D n_D / (w_U n_U) <= 4/3, with n_D desirable and n_U undesirable examples.
      undesirable_weight: w_U; one of the two weights may be 0, which uses these examples only for z_0.
    """
    check_positive(beta=beta)
    check_not_negative(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    if not (desirable_weight or undesirable_weight):
        raise ValueError(
            "desirable_weight and undesirable_weight are both 0, which trains nothing: make one positive."
        )
    desirable = _desirable(pairs)
    total = (pairs.rejected_log_ratio * pairs.weights).sum()
    estimate = total / jnp.maximum(pairs.weights.sum(), 1.0)
    distance = jax.lax.stop_gradient(jnp.maximum(estimate, 0.0))
    gain = beta * (pairs.chosen_log_ratio - distance)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight * sigmoid(jnp.where(desirable, -gain, gain))


def apo_zero_unpaired(pairs: PairLogProbs, *, beta: float = 0.1) -> jax.Array:
    """1 - sigma(beta c) if desirable, else sigma(beta c): `absolute.apo_zero` of single completions, without z_0."""
    check_positive(beta=beta)
    desirable = _desirable(pairs)
    reward = beta * pairs.chosen_log_ratio
    return sigmoid(jnp.where(desirable, -reward, reward))


def _desirable(pairs: PairLogProbs) -> jax.Array:
    if pairs.labels is None:
        raise MissingLabelsError(
            "This loss reads labels of single completions, but the data are pairs: train on unpaired examples, or choose "
            "a loss of pairs (direct.dpo, absolute.apo_zero)."
        )
    return pairs.labels > 0
