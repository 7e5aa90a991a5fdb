"""Terms added to a preference loss that keep chosen completions likely. Shape: P pairs; float32 [P], unweighted."""

from typing import Literal

import jax
from jax.nn import softplus

from espalier.common.ranges import check_choice
from espalier.trainers.preference.losses.pairs import PairLogProbs

NllReduction = Literal["mean", "sum", "tokens"]


def nll(pairs: PairLogProbs, *, reduction: NllReduction = "mean") -> jax.Array:
    """Negative log-likelihood of the chosen completion.

    Args:
      reduction: 'mean' is the mean over each completion's tokens, so that all pairs have equal weight; 'sum' is the sum
        over its tokens; with 'tokens', the mean over all pairs is the mean over all their tokens (TRL's `sft`).
    """
    check_choice("reduction", reduction, NllReduction)
    if reduction == "mean":
        return -pairs.chosen_mean
    return -pairs.chosen if reduction == "sum" else -pairs.chosen / pairs.mean_chosen_length


def slic_regulariser(pairs: PairLogProbs) -> jax.Array:
    """softplus(1 - c), c the log-ratio of the chosen completion: the term added to SLiC's hinge in arXiv 2410.11677.

    The paper does not say whether c is of sums, as here, or of means per token.
    """
    return softplus(1 - pairs.chosen_log_ratio)
