"""Losses that compare two completions without a reference. Shape: P pairs.

s_w and s_l are summed log-probabilities, n_w and n_l lengths, a = s / n, and sigma is the logistic function. Losses are
float32 [P], unweighted, as in trainers/preference/losses/direct.py. cpo, simpo and alpha_po have the formulas of TRL's
CPOTrainer (1.16), orpo those of its ORPOTrainer. The likelihood term of CPO and ORPO is a separate loss, `terms.nll`.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, relu

from espalier.common.ranges import Fraction, NonNegative, Positive
from espalier.trainers.objectives.settings import check_positive
from espalier.trainers.preference.losses.direct import logistic
from espalier.trainers.preference.losses.divergence import box_cox
from espalier.trainers.preference.losses.pairs import PairLogProbs

# The smallest -log p in nats that a float32 log-softmax distinguishes from p = 1.
_LEAST_SURPRISE = float(jnp.finfo(jnp.float32).eps)


def slic_hinge(pairs: PairLogProbs, *, gamma: NonNegative = 1.0) -> jax.Array:
    """max(0, gamma - (a_w - a_l)): SLiC-HF (arXiv 2305.10425) in the form of arXiv 2410.11677, with means per token.

    Its regulariser is `terms.slic_regulariser`.
    """
    check_positive(gamma=gamma)
    return relu(gamma - (pairs.chosen_mean - pairs.rejected_mean))


def simpo(
    pairs: PairLogProbs,
    *,
    beta: Positive = 2.0,
    gamma: NonNegative = 1.0,
    label_smoothing: Fraction = 0.0,
) -> jax.Array:
    """-log sigma(beta (a_w - a_l) - gamma): SimPO (arXiv 2405.14734, eq. 6).

    Args:
      beta: scale of the rewards; means per token need a larger one than sums.
      gamma: required margin, in units of the logit; half of beta is a usual value. TRL's default is 0.5.
      label_smoothing: see `direct.logistic`.
    """
    check_positive(beta=beta)
    return logistic(beta * (pairs.chosen_mean - pairs.rejected_mean) - gamma, label_smoothing)


def alpha_po(
    pairs: PairLogProbs,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """SimPO with rewards (1 - p^-alpha) / alpha instead of log p = a: AlphaPO (arXiv 2501.03884).

    Args:
      pairs, beta, gamma, label_smoothing: see `simpo`.
      alpha: shape of the reward; 0 gives log p, and positive values penalise improbable completions more than log p.
    """
    check_positive(beta=beta)
    chosen, rejected = box_cox(pairs.chosen_mean, -alpha), box_cox(pairs.rejected_mean, -alpha)
    return logistic(beta * (chosen - rejected) - gamma, label_smoothing)


def cpo(pairs: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: Fraction = 0.0) -> jax.Array:
    """-log sigma(beta (s_w - s_l)): the preference term of CPO (arXiv 2401.08417, eq. 3)."""
    check_positive(beta=beta)
    return logistic(beta * (pairs.chosen - pairs.rejected), label_smoothing)


def orpo(pairs: PairLogProbs, *, beta: Positive = 0.1) -> jax.Array:
    """-beta log sigma(log of the odds ratio): the preference term of ORPO (arXiv 2403.07691, eq. 7).

    Odds are p / (1 - p) with p = e^a. The likelihood term of TRL includes prompts; `terms.nll` has only completions.
    """
    check_positive(beta=beta)
    return -beta * log_sigmoid(_log_odds(pairs.chosen_mean) - _log_odds(pairs.rejected_mean))


def _log_odds(log_prob: jax.Array) -> jax.Array:
    """log(p / (1 - p)); a probability that rounds to 1 counts as 1 - eps and has no gradient."""
    below_one = jnp.minimum(log_prob, -_LEAST_SURPRISE)
    return below_one - jnp.log(-jnp.expm1(below_one))
