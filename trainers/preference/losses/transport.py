"""Alignment by optimal transport (AOT, arXiv 2406.05882): whole distributions in place of pairs. Shape: P pairs.

Both losses compare two sorted samples rank by rank. The value of a pair therefore depends on the others that share its
microbatch, and the loss of a batch on how it is split: large microbatches compare better. Slots of weight 0 sort behind
all others, where they meet only each other. Form, names and errors are as in direct.py.
"""

import jax
import jax.numpy as jnp

from trainers.preference.losses.logistic import logistic
from trainers.preference.losses.pairs import PairLogProbs
from trainers.preference.losses.settings import check_positive


def aot(pairs: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> jax.Array:
    """The logistic loss of beta d, d the policy's s_w - s_l less the reference's of the same rank."""
    check_positive(beta=beta)
    policy = pairs.chosen - pairs.rejected
    return logistic(beta * _above_peer(policy, pairs.ref_margin, pairs.weights), label_smoothing)


def aot_unpaired(
    pairs: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> jax.Array:
    """The logistic loss of beta d, d a chosen log-ratio less the rejected one of the same rank."""
    check_positive(beta=beta)
    chosen, rejected = pairs.chosen_log_ratio, pairs.rejected_log_ratio
    return logistic(beta * _above_peer(chosen, rejected, pairs.weights), label_smoothing)


def _above_peer(sample: jax.Array, other: jax.Array, weights: jax.Array) -> jax.Array:
    """[P] each value of `sample` less that of `other` which has its rank."""
    rank = jnp.argsort(_order(sample, weights))
    return sample - other[_order(other, weights)[rank]]


def _order(values: jax.Array, weights: jax.Array) -> jax.Array:
    """[P] slots in the order of their values, those without a pair last."""
    return jnp.lexsort((values, weights == 0))
