"""Initial standard deviation of the last kernel of a router with a gated hidden layer.

It is chosen so that the first logits have the standard deviation `logit_std`.

Shapes: D width, M width of an embedding of a domain, F hidden width.
"""

import numpy as np


def down_std(domain_dim: int, width: int, logit_std: float, length: float = 1.0) -> float:
    """Returns the standard deviation of a DomainRouter's `down` [D, D] that gives logits with `logit_std`.

    States are assumed to have unit variance. For an embedding of length l, `gate` and `up` with variance 1/M give
    Gaussians a and b of variance l^2/M. With h = silu(a) b, |e|^2 = D^2 std^2 E[h^2], and a logit's variance is |e|^2.
    """
    power = _silu_power(length / np.sqrt(domain_dim)) * length**2 / domain_dim
    return float(logit_std / (width * np.sqrt(power)))


def token_down_std(hidden: int, logit_std: float) -> float:
    """Returns the standard deviation of an MlpRouter's `down` [F, E] that gives logits with `logit_std`.

    `gate` and `up` are assumed to give Gaussians of variance 1.
    """
    return float(logit_std / np.sqrt(hidden * _silu_power(1.0)))


def _silu_power(std: float) -> float:
    """Returns E[silu(a)^2] for a Gaussian a with this standard deviation."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    gate = std * nodes
    return float(np.sum(weights * (gate / (1 + np.exp(-gate))) ** 2) / np.sum(weights))
