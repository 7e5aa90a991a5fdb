"""f-DPO (arXiv 2309.16240): divergences that hold a policy near its reference, as scores of a log-ratio.

Where the penalty is the divergence of a convex f, the reward that a policy stands for is beta f'(t) plus a term of the
prompt, with t = pi_theta / pi_ref. That term cancels in the difference of two completions' rewards and nowhere else,
so that only losses of such a difference take a divergence: theirs is log t, f' of the reverse KL, by default.

A score is a function of u = log t, of any shape, in float32; gin binds one: `direct.dpo.divergence = @divergence.js`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

Divergence = Callable[[jax.Array], jax.Array]

# e^80 is within float32 and so is its product with a length or another moderate number.
_LARGEST_EXPONENT = 80.0


def reverse_kl(log_ratio: jax.Array) -> jax.Array:
    """log t, of KL(pi_theta || pi_ref): DPO's."""
    return log_ratio


def forward_kl(log_ratio: jax.Array) -> jax.Array:
    """1 - 1/t, of KL(pi_ref || pi_theta), where the constant makes t = 1 score 0."""
    return box_cox(log_ratio, -1.0)


def js(log_ratio: jax.Array) -> jax.Array:
    """log(2t / (1 + t)), of the Jensen-Shannon divergence; at most log 2."""
    return math.log(2.0) + log_sigmoid(log_ratio)


def alpha(log_ratio: jax.Array, *, coefficient: float = 0.5) -> jax.Array:
    """(t^(a - 1) - 1) / (a - 1), of the alpha-divergence with a = `coefficient`.

    With a = 1 it is the reverse and with a = 0 the forward KL. That is TRL's coefficient; the paper's is 1 - a.
    """
    return box_cox(log_ratio, coefficient - 1.0)


def box_cox(log_x: jax.Array, power: float) -> jax.Array:
    """(x^power - 1) / power, which is log x where power is 0.

    Powers beyond e^80 count as e^80, with no gradient: the difference of two infinities would be none.
    """
    if not power:
        return log_x
    return jnp.expm1(jnp.minimum(power * log_x, _LARGEST_EXPONENT)) / power
