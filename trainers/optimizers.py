"""Optimisers, each with a decay mask and clipping by global norm around optax's own update.

Every function is keyword-only and returns an `optax.GradientTransformation`. They share
  learning_rate: a schedule (trainers/schedules.py) or a constant;
  weight_decay: decoupled decay, multiplied by the learning rate;
  no_decay: path patterns of parameters that are not decayed;
  max_grad_norm: global norm above which gradients are scaled down; None for no clipping;
  moment_dtype: storage dtype of the first moment; the parameter's own when None.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from optax import contrib

from trainers import trainable
from trainers.schedules import Schedule

# Gains and biases are not decayed: shrinking them changes a layer's scale, not its complexity.
NO_DECAY = (r"(.*/)?(scale|bias)",)

Rate = Schedule | float


def _decay_mask(no_decay: Sequence[str]) -> Callable[[Any], Any]:
    def mask(params):
        names = [trainable.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        # A pattern for biases matches nothing in a model without them, which is no mistake here.
        used = [p for p in no_decay if any(re.fullmatch(p, name) for name in names)]
        exempt = trainable.match(used, params, what="no_decay pattern")
        return jax.tree.map(lambda leaf: not leaf, exempt)

    return mask


def _clipped(
    optimizer: optax.GradientTransformation, max_grad_norm: float | None
) -> optax.GradientTransformation:
    if max_grad_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


def adamw(
    *,
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_decay: Sequence[str] = NO_DECAY,
    max_grad_norm: float | None = 1.0,
    moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""
    optimizer = optax.adamw(
        learning_rate,
        b1,
        b2,
        eps,
        mu_dtype=moment_dtype,
        weight_decay=weight_decay,
        mask=_decay_mask(no_decay),
    )
    return _clipped(optimizer, max_grad_norm)


def lion(
    *,
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.1,
    no_decay: Sequence[str] = NO_DECAY,
    max_grad_norm: float | None = 1.0,
    moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Lion (Chen et al., arXiv 2302.06675)."""
    optimizer = optax.lion(
        learning_rate,
        b1,
        b2,
        mu_dtype=moment_dtype,
        weight_decay=weight_decay,
        mask=_decay_mask(no_decay),
    )
    return _clipped(optimizer, max_grad_norm)


def adafactor(
    *,
    learning_rate: Rate,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = NO_DECAY,
    max_grad_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adafactor without momentum (Shazeer and Stern, arXiv 1804.04235), T5's optimiser."""
    optimizer = optax.chain(
        optax.adafactor(
            learning_rate=None,
            decay_rate=decay_rate,
            clipping_threshold=clipping_threshold,
            multiply_by_parameter_scale=multiply_by_parameter_scale,
        ),
        # optax.adafactor has already turned the sign, so decay joins with the same sign.
        optax.add_decayed_weights(-weight_decay, _decay_mask(no_decay)),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
    )
    return _clipped(optimizer, max_grad_norm)


def _muon_dimensions(params: Any) -> Any:
    """Kernels are orthogonalised layer by layer; tables, gains and biases fall back to AdamW."""

    def dimensions(path, leaf):
        if not trainable.path_name(path).endswith("kernel"):
            return None
        return contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def muon(
    *,
    learning_rate: Rate,
    beta: float = 0.95,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    weight_decay: float = 0.1,
    no_decay: Sequence[str] = NO_DECAY,
    max_grad_norm: float | None = 1.0,
    moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) on kernels, AdamW with Nesterov momentum on everything else.

    Updates are rescaled to AdamW's typical root mean square of 0.2 (arXiv 2502.16982), so that one
    learning rate serves both groups.
    """
    optimizer = optax.chain(
        contrib.muon(
            1.0,
            beta=beta,
            mu_dtype=moment_dtype,
            adam_b1=adam_b1,
            adam_b2=adam_b2,
            muon_weight_dimension_numbers=_muon_dimensions,
            consistent_rms=0.2,
        ),
        # Decay and learning rate are outside, one mask for both groups: contrib.muon has none for
        # AdamW's. It has already turned the sign, so decay joins with the same sign.
        optax.add_decayed_weights(-weight_decay, _decay_mask(no_decay)),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
    )
    return _clipped(optimizer, max_grad_norm)


def sgd(
    *,
    learning_rate: Rate,
    momentum: float | None = None,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = NO_DECAY,
    max_grad_norm: float | None = None,
) -> optax.GradientTransformation:
    """Stochastic gradient descent, with heavy-ball momentum if given."""
    # Decay comes after the momentum, as in AdamW: decoupled, not part of the gradient's average.
    optimizer = optax.chain(
        optax.trace(momentum) if momentum else optax.identity(),
        optax.add_decayed_weights(weight_decay, _decay_mask(no_decay)),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _clipped(optimizer, max_grad_norm)
