"""Losses with a term for each completion by itself, not only for the difference of two. Shape: P pairs.

c, r, beta and errors are as in trainers/preference/losses/direct.py. Losses are float32 [P], unweighted, with TRL's
names and formulas. There is no `divergence`: its unknown term of the prompt does not cancel here.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from trainers.objectives.settings import check_positive
from trainers.preference.losses.pairs import PairLogProbs


def nca_pair(pairs: PairLogProbs, *, beta: float = 0.1) -> jax.Array:
    """-log sigma(beta c) - (log sigma(-beta c) + log sigma(-beta r)) / 2: NCA of a pair (arXiv 2402.05369)."""
    chosen, rejected = _rewards(pairs, beta)
    return -log_sigmoid(chosen) - 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))


def bco_pair(pairs: PairLogProbs, *, beta: float = 0.1) -> jax.Array:
    """-log sigma(beta c) - log sigma(-beta r): BCO (arXiv 2404.04656) without its running shift of rewards."""
    chosen, rejected = _rewards(pairs, beta)
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


def sppo_hard(pairs: PairLogProbs, *, beta: float = 0.1) -> jax.Array:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2: SPPO (arXiv 2405.00675, eq. 4.7) with win probability 1 of the chosen completion."""
    check_positive(beta=beta)
    half = 0.5 / beta
    return jnp.square(pairs.chosen_log_ratio - half) + jnp.square(pairs.rejected_log_ratio + half)


def apo_zero(pairs: PairLogProbs, *, beta: float = 0.1) -> jax.Array:
    """1 - sigma(beta c) + sigma(beta r): APO (arXiv 2408.06266, eq. 7) for chosen completions better than the policy's."""
    chosen, rejected = _rewards(pairs, beta)
    return sigmoid(-chosen) + sigmoid(rejected)


def apo_down(pairs: PairLogProbs, *, beta: float = 0.1) -> jax.Array:
    """sigma(beta c) + 1 - sigma(beta (c - r)): APO (eq. 8) for pairs that are both worse than the policy's completions."""
    chosen, rejected = _rewards(pairs, beta)
    return sigmoid(chosen) + sigmoid(rejected - chosen)


def _rewards(pairs: PairLogProbs, beta: float) -> tuple[jax.Array, jax.Array]:
    check_positive(beta=beta)
    return beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio
