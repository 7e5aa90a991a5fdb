"""Decay of factorised matrices: of the factors (L2), or of their product (Frobenius decay).

L2 on both factors is an upper bound of the product's nuclear norm and so lowers its rank. Frobenius decay,
(1/2) |U V^T|^2, does not (Khodak et al., arXiv 2105.01029; Kamalakara et al., arXiv 2209.13569). Neither is computed
by forming the product.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
import optax

from espalier.common.ranges import NonNegative
from espalier.model.low_rank import factors
from espalier.trainers.optim.gradient_terms import GradientTerm
from espalier.trainers.optim.optimizers import Rate

Kind = Literal["none", "l2", "frobenius"]
KINDS = get_args(Kind)
FACTORS = r"(.*/)?(u|v)"


def factor_decay(
    *, kind: Kind = "frobenius", weight: NonNegative = 1e-4, coupled: bool = True
) -> GradientTerm:
    """Returns the decay of factorised matrices; the optimiser's own weight decay then skips them.

    Args:
      kind: kind of decay; 'none' for no decay of factors.
      weight: lambda in (lambda / 2) |U V^T|^2 or (lambda / 2) (|U|^2 + |V|^2).
      coupled: if True, the decay's gradient is added to the loss gradient before the optimiser, as in the reference;
        else it is subtracted after the update, times the learning rate, as in AdamW.
    """
    if kind not in KINDS:
        raise ValueError(
            f"factor_decay.kind = {kind!r}: choose from {', '.join(map(repr, KINDS))}."
        )

    def added_to(
        optimizer: optax.GradientTransformation, learning_rate: Rate
    ) -> optax.GradientTransformation:
        if kind == "none" or not weight:
            return optimizer
        if coupled:
            return optax.chain(add_decay(kind, weight), optimizer)
        return optax.chain(optimizer, _subtract_decay(kind, weight, learning_rate))

    return GradientTerm(added_to=added_to, no_decay=(FACTORS,))


def add_decay(kind: Kind, weight: float) -> optax.GradientTransformation:
    """Adds `weight` times the decay's gradient to the updates of `u` and `v`."""
    return optax.stateless(lambda updates, params: _added(updates, params, kind, weight))


def _subtract_decay(kind: Kind, weight: float, rate: Rate) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        now = rate(state.count) if callable(rate) else rate
        count = optax.safe_increment(state.count)
        return _added(updates, params, kind, -weight * now), optax.ScaleByScheduleState(count)

    def init(params):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def _added(updates: Any, params: Any, kind: Kind, weight: Any) -> Any:
    """Returns the updates plus the decay of matrices with both factors in training."""
    if not isinstance(updates, Mapping):
        return updates
    out = {name: _added(updates[name], params[name], kind, weight) for name in updates}
    if factors.is_factorised(params) and factors.is_factorised(updates):
        u, v = params["u"], params["v"]
        decays = (u, v) if kind == "l2" else factors.frobenius_decay(u, v)
        for name, grad in zip(("u", "v"), decays, strict=True):
            out[name] = (updates[name] + weight * grad).astype(updates[name].dtype)
    return out
