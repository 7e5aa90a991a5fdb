"""f-DPO (arXiv 2309.16240): divergences between policy and reference, as scores of a log-ratio.

If the penalty is the divergence of a convex f, the implicit reward of a policy is beta f'(t) plus a term of the prompt,
with t = pi_theta / pi_ref. That term cancels only in the difference of two completions' rewards, so only losses of such
a difference have a setting `divergence`. Its default is the reverse KL, with f'(t) = log t up to a constant.

A score is a function of u = log t, of any shape, in float32. Gin binds it: `direct.dpo.divergence = @divergence.js`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

Divergence = Callable[[jax.Array], jax.Array]

# e^80 is finite in float32, and so is its product with a length or another moderate number.
_LARGEST_EXPONENT = 80.0


def reverse_kl(log_ratio: jax.Array) -> jax.Array:
    """log t: the score of KL(pi_theta || pi_ref), as in DPO."""
    return log_ratio


def forward_kl(log_ratio: jax.Array) -> jax.Array:
    """1 - 1/t: the score of KL(pi_ref || pi_theta), with a constant that makes it 0 at t = 1."""
    return box_cox(log_ratio, -1.0)


def js(log_ratio: jax.Array) -> jax.Array:
    """log(2t / (1 + t)): the score of the Jensen-Shannon divergence; at most log 2."""
    return math.log(2.0) + log_sigmoid(log_ratio)


def alpha(log_ratio: jax.Array, *, coefficient: float = 0.5) -> jax.Array:
    """(t^(a - 1) - 1) / (a - 1): the score of the alpha-divergence with a = `coefficient`.

    a = 1 is the reverse KL, a = 0 the forward KL. This is TRL's coefficient; the paper's is 1 - a.
    """
    return box_cox(log_ratio, coefficient - 1.0)


def box_cox(log_x: jax.Array, power: float) -> jax.Array:
    """(x^power - 1) / power, or log x if power is 0.

    x^power is clipped at e^80, with no gradient beyond: the difference of two infinities would be NaN.
    """
    if not power:
        return log_x
    return jnp.expm1(jnp.minimum(power * log_x, _LARGEST_EXPONENT)) / power
