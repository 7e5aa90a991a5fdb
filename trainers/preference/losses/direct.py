"""Direct alignment: losses of the difference of two log-ratios to a reference. Shape: P pairs.

c = log pi_theta(y_w) / pi_ref(y_w) and r = log pi_theta(y_l) / pi_ref(y_l) are sums over a completion's tokens. n_w and
n_l are the numbers of these tokens. Delta = c - r, z = beta Delta, and sigma is the logistic function. Losses are
float32 [P], one unweighted value per pair. They have TRL's names and, unless noted otherwise, its formulas (DPOTrainer,
1.16); `dpo` is its `sigmoid`. Invalid settings raise ValueError, pairs without a reference MissingReferenceError.

Losses with a setting `divergence` replace c and r by its scores (trainers/preference/losses/divergence.py). Losses that
use c and r other than by their difference are in absolute.py and transport.py.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, relu, sigmoid

from espalier.common.ranges import Fraction, Positive, check_choice
from espalier.trainers.objectives.settings import check_positive, check_smoothing
from espalier.trainers.preference.losses.divergence import Divergence, reverse_kl
from espalier.trainers.preference.losses.pairs import PairLogProbs

Reduction = Literal["sum", "mean"]
Scale = Literal["paper", "trl"]


def logistic(logits: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """-(1 - eps) log sigma(z) - eps log sigma(-z), of the shape of z.

    Args:
      logits: z, the log-odds that the chosen completion is preferred.
      label_smoothing: eps, the assumed share of swapped labels, in [0, 0.5). With DPO's z this is cDPO
        (https://ericmitchell.ai/cdpo.pdf).
    """
    check_smoothing(label_smoothing)
    if not label_smoothing:
        return -log_sigmoid(logits)
    return -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)


def dpo(
    pairs: PairLogProbs,
    *,
    beta: Positive = 0.1,
    label_smoothing: Fraction = 0.0,
    divergence: Divergence = reverse_kl,
) -> jax.Array:
    """-log sigma(z): DPO (arXiv 2305.18290, eq. 7); cDPO with `label_smoothing`, which TRL no longer has.

    Args:
      beta: strength of the penalty on the divergence from the reference.
      label_smoothing: see `logistic`.
      divergence: the divergence that is penalised (arXiv 2309.16240).
    """
    check_positive(beta=beta)
    return logistic(beta * _margin(pairs, divergence), label_smoothing)


def robust(
    pairs: PairLogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    divergence: Divergence = reverse_kl,
) -> jax.Array:
    """[-(1 - eps) log sigma(z) + eps log sigma(-z)] / (1 - 2 eps): robust DPO (arXiv 2403.00409).

    If labels are swapped with probability eps, its expectation is DPO's loss with the true labels. It has no lower
    bound as z grows. TRL's default is eps = 0, which is DPO.
    """
    check_positive(beta=beta)
    check_smoothing(label_smoothing)
    logits = beta * _margin(pairs, divergence)
    clean = -(1 - label_smoothing) * log_sigmoid(logits)
    return (clean + label_smoothing * log_sigmoid(-logits)) / (1 - 2 * label_smoothing)


def ipo(
    pairs: PairLogProbs,
    *,
    tau: Positive = 0.1,
    reduction: Reduction = "sum",
    scale: Scale = "paper",
    divergence: Divergence = reverse_kl,
) -> jax.Array:
    """(tau Delta - 1/2)^2: IPO (arXiv 2310.12036, eq. 17; this form arXiv 2410.11677), with its minimum at Delta = 1 / (2 tau).

    Args:
      pairs, divergence: see `dpo`.
      tau: strength of the penalty on the divergence from the reference; TRL's beta.
      reduction: 'sum' as in the papers; with 'mean', c and r are divided by n_w and n_l, as TRL does on the advice of
        IPO's authors. The same tau then penalises about n times as strongly.
      scale: 'trl' is (Delta - 1 / (2 tau))^2, the paper's loss divided by tau^2. TRL's loss is 'mean' and 'trl'.
    """
    check_positive(tau=tau)
    check_choice("reduction", reduction, Reduction)
    check_choice("scale", scale, Scale)
    margin = _margin(pairs, divergence, per_token=reduction == "mean")
    if scale == "paper":
        return jnp.square(tau * margin - 0.5)
    return jnp.square(margin - 0.5 / tau)


def hinge(
    pairs: PairLogProbs, *, beta: float = 0.1, divergence: Divergence = reverse_kl
) -> jax.Array:
    """max(0, 1 - z): RSO's hinge (arXiv 2309.06657).

    It uses sums over tokens and a reference, unlike the hinge of SLiC, `reference_free.slic_hinge`.
    """
    check_positive(beta=beta)
    return relu(1 - beta * _margin(pairs, divergence))


def exo_pair(
    pairs: PairLogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    divergence: Divergence = reverse_kl,
) -> jax.Array:
    """KL of (sigma(z), sigma(-z)) from (1 - eps, eps): EXO (arXiv 2402.00856, eq. 16).

    eps is `label_smoothing`. It must be positive: with 0 the divergence is infinite. The paper uses 1e-3.
    """
    check_positive(beta=beta)
    check_smoothing(label_smoothing, may_be_zero=False)
    logits = beta * _margin(pairs, divergence)
    chosen = sigmoid(logits) * (log_sigmoid(logits) - math.log1p(-label_smoothing))
    return chosen + sigmoid(-logits) * (log_sigmoid(-logits) - math.log(label_smoothing))


def discopop(
    pairs: PairLogProbs,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
    divergence: Divergence = reverse_kl,
) -> jax.Array:
    """(1 - g) (-log sigma(z)) + g exp(-z) with g = sigma(z / tau): DiscoPOP (arXiv 2406.08414, eq. 5)."""
    check_positive(beta=beta, tau=tau)
    logits = beta * _margin(pairs, divergence)
    # g exp(-z) as one exponential: for very negative z, g is 0 and exp(-z) infinite.
    exponential = jnp.exp(log_sigmoid(logits / tau) - logits)
    return exponential - sigmoid(-logits / tau) * log_sigmoid(logits)


def sigmoid_norm(
    pairs: PairLogProbs, *, beta: float = 0.1, divergence: Divergence = reverse_kl
) -> jax.Array:
    """-log sigma(beta (c / n_w - r / n_l)): DPO normalised by length (Tulu 3, arXiv 2411.15124)."""
    check_positive(beta=beta)
    return -log_sigmoid(beta * _margin(pairs, divergence, per_token=True))


def dpop(pairs: PairLogProbs, *, beta: float = 0.1, penalty: float = 50.0) -> jax.Array:
    """-log sigma(z - beta lambda max(0, -c)): DPO-Positive (arXiv 2402.13228); not in TRL.

    lambda is `penalty`, the weight of a chosen completion's log-ratio below 0. This is the original formula; the one in
    arXiv 2410.11677 has the rejected completion in the ratio.
    """
    check_positive(beta=beta, penalty=penalty)
    fallen = relu(-pairs.chosen_log_ratio)
    return -log_sigmoid(beta * (pairs.margin - penalty * fallen))


def _margin(pairs: PairLogProbs, divergence: Divergence, *, per_token: bool = False) -> jax.Array:
    """Returns the chosen completion's score minus the rejected one's, each divided by its length if `per_token`."""
    if not callable(divergence):
        raise ValueError(
            f"divergence = {divergence!r} must be a function of a log-ratio: bind one of "
            "trainers/preference/losses/divergence.py, such as @divergence.js."
        )
    chosen, rejected = divergence(pairs.chosen_log_ratio), divergence(pairs.rejected_log_ratio)
    if per_token:
        return chosen / pairs.chosen_length - rejected / pairs.rejected_length
    return chosen - rejected
