"""Alignment by optimal transport (AOT, arXiv 2406.05882): compares distributions instead of pairs. Shape: P pairs.

Both losses compare two sorted samples rank by rank. The loss of a pair therefore depends on the other pairs of its
microbatch, and the loss of a batch depends on its split into microbatches; large microbatches compare better. Slots of
weight 0 are sorted last, so that they are compared only with each other. Shapes, names and errors are as in direct.py.
"""

import jax
import jax.numpy as jnp

from trainers.objectives.settings import check_positive
from trainers.preference.losses.direct import logistic
from trainers.preference.losses.pairs import PairLogProbs


def aot(pairs: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> jax.Array:
    """Logistic loss of beta d: d is the policy's s_w - s_l minus the reference's s_w - s_l of the same rank."""
    check_positive(beta=beta)
    policy = pairs.chosen - pairs.rejected
    return logistic(beta * _above_peer(policy, pairs.ref_margin, pairs.weights), label_smoothing)


def aot_unpaired(
    pairs: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> jax.Array:
    """Logistic loss of beta d: d is a chosen log-ratio minus the rejected log-ratio of the same rank."""
    check_positive(beta=beta)
    chosen, rejected = pairs.chosen_log_ratio, pairs.rejected_log_ratio
    return logistic(beta * _above_peer(chosen, rejected, pairs.weights), label_smoothing)


def _above_peer(sample: jax.Array, other: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns each value of `sample` minus the value of `other` with the same rank, [P]."""
    rank = jnp.argsort(_order(sample, weights))
    return sample - other[_order(other, weights)[rank]]


def _order(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the slots sorted by their values, [P], slots without a pair last."""
    return jnp.lexsort((values, weights == 0))
