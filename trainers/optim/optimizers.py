"""Optimisers: optax's updates with a weight decay mask and clipping by global norm.

Every function is keyword-only and returns an `optax.GradientTransformation`. They share these arguments:
  learning_rate: a schedule (trainers/optim/schedules.py) or a constant;
  param_axes: logical axes of the model's parameters; they decide which parameters are decayed and which are stacked;
  weight_decay: decoupled decay, multiplied by the learning rate;
  no_decay: path patterns of further parameters that are not decayed;
  max_grad_norm: global norm above which gradients are scaled down; None for no clipping;
  moment_dtype: storage dtype of the first moment; None for the parameter's dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from espalier.common.ranges import Decay, NonNegative, Positive
from espalier.trainers import trainable
from espalier.trainers.optim.gradient_terms import ParamAxes
from espalier.trainers.optim.schedules import Schedule

Rate = Schedule | float


def _decay_mask(param_axes: ParamAxes, no_decay: Sequence[str]) -> Callable[[Any], Any]:
    def mask(params):
        exempt = trainable.match(no_decay, params, what="no_decay pattern")
        return jax.tree_util.tree_map_with_path(
            lambda path, is_exempt: not is_exempt and param_axes.decayed(trainable.path_name(path)),
            exempt,
        )

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
    param_axes: ParamAxes,
    b1: Decay = 0.9,
    b2: Decay = 0.95,
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.1,
    no_decay: Sequence[str] = (),
    max_grad_norm: Positive | None = 1.0,
    moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter, arXiv 1711.05101), with clipping of the gradients before it.

    Args:
      learning_rate: a schedule (trainers/optim/schedules.py), or a constant.
      param_axes: logical axes of the model's parameters; matrices are decayed, gains, biases and other vectors are not.
      b1, b2: decay of the moving averages of the gradient and of its square, each update.
      eps: is added to the square root of the second moment.
      weight_decay: decoupled decay: an update subtracts learning_rate * weight_decay * parameter.
      no_decay: regular expressions of paths of further parameters that are not decayed.
      max_grad_norm: global norm to which larger gradients are scaled down; None for no clipping.
      moment_dtype: dtype in which the first moment is stored; None for the parameter's dtype.
    """
    mask = _decay_mask(param_axes, no_decay)
    optimizer = optax.adamw(
        learning_rate, b1, b2, eps, mu_dtype=moment_dtype, weight_decay=weight_decay, mask=mask
    )
    return _clipped(optimizer, max_grad_norm)


def lion(
    *,
    learning_rate: Rate,
    param_axes: ParamAxes,
    b1: Decay = 0.9,
    b2: Decay = 0.99,
    weight_decay: NonNegative = 0.1,
    no_decay: Sequence[str] = (),
    max_grad_norm: Positive | None = 1.0,
    moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Returns Lion (Chen et al., arXiv 2302.06675); the arguments have the meaning that they have in `adamw`."""
    mask = _decay_mask(param_axes, no_decay)
    optimizer = optax.lion(
        learning_rate, b1, b2, mu_dtype=moment_dtype, weight_decay=weight_decay, mask=mask
    )
    return _clipped(optimizer, max_grad_norm)


def _stackwise(
    factored: optax.GradientTransformation,
    after: optax.GradientTransformation,
    param_axes: ParamAxes,
) -> optax.GradientTransformation:
    """Applies `factored`, then the stateless `after`, to each parameter of a stack separately.

    Vmaps only over the leading axes that stack parameters. The state stays a FactoredState, so that its moments are
    recognised as belonging to parameters.
    """

    def over_stack(function: Callable, path: tuple[Any, ...]) -> Callable:
        for _ in range(param_axes.stack_rank(trainable.path_name(path))):
            function = jax.vmap(function)
        return function

    def field(tree: Any, params: Any, index: int) -> Any:
        return jax.tree.map(lambda _, leaves: leaves[index], params, tree)

    def init(params):
        def one(param):
            _, *statistics = factored.init(param)
            return statistics

        tree = jax.tree_util.tree_map_with_path(lambda p, x: over_stack(one, p)(x), params)
        statistics = (field(tree, params, i) for i in range(3))
        return optax.FactoredState(jnp.zeros((), jnp.int32), *statistics)

    def update(updates, state, params):
        count, *statistics = state

        def one(param, grad, *old):
            grad, (_, *new) = factored.update(grad, optax.FactoredState(count, *old), param)
            grad, _ = after.update(grad, after.init(param), param)
            return *new, grad

        tree = jax.tree_util.tree_map_with_path(
            lambda path, *leaves: over_stack(one, path)(*leaves), params, updates, *statistics
        )
        *new, updates = (field(tree, params, i) for i in range(4))
        return updates, optax.FactoredState(optax.safe_increment(count), *new)

    return optax.GradientTransformation(init, update)


def adafactor(
    *,
    learning_rate: Rate,
    param_axes: ParamAxes,
    decay_rate: NonNegative = 0.8,
    clipping_threshold: Positive | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    weight_decay: NonNegative = 0.0,
    no_decay: Sequence[str] = (),
    max_grad_norm: Positive | None = None,
) -> optax.GradientTransformation:
    """Adafactor without momentum (Shazeer and Stern, arXiv 1804.04235), T5's optimiser.

    Scanned layers, and experts, are stacked in one array. Statistics, clipping and scale are still computed for each
    layer's or expert's parameter separately.

    Args:
      learning_rate: a schedule or a constant; relative to the size of each parameter with `multiply_by_parameter_scale`.
      param_axes, weight_decay, no_decay, max_grad_norm: see `adamw`.
      decay_rate: the second moment of update t decays by 1 - t^-decay_rate.
      clipping_threshold: root mean square above which an update is scaled down; None for no such clipping.
      multiply_by_parameter_scale: whether updates are multiplied by the root mean square of their parameter.
    """
    scale = optax.scale_by_factored_rms(decay_rate=decay_rate)
    steps = [optax.identity()]
    if clipping_threshold is not None:
        steps.append(optax.clip_by_block_rms(clipping_threshold))
    if multiply_by_parameter_scale:
        steps.append(optax.scale_by_param_block_rms())
    optimizer = optax.chain(
        _stackwise(scale, optax.chain(*steps), param_axes),
        optax.add_decayed_weights(weight_decay, _decay_mask(param_axes, no_decay)),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _clipped(optimizer, max_grad_norm)


def _muon_dimensions(params: Any) -> Any:
    """Returns Muon's dimensions: kernels and factors are orthogonalised per layer; tables, gains and biases use AdamW."""

    def dimensions(path, leaf):
        if trainable.path_name(path).rpartition("/")[2] not in ("kernel", "u", "v"):
            return None
        return contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def muon(
    *,
    learning_rate: Rate,
    param_axes: ParamAxes,
    beta: Positive = 0.95,
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.95,
    weight_decay: NonNegative = 0.1,
    no_decay: Sequence[str] = (),
    max_grad_norm: Positive | None = 1.0,
    moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) on kernels and factors, AdamW with Nesterov momentum on everything else.

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
        # Decay and learning rate are applied here, with one mask for both groups: contrib.muon has no decay mask for
        # AdamW. Its updates are already negated, so the decay is negative too.
        optax.add_decayed_weights(-weight_decay, _decay_mask(param_axes, no_decay)),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
    )
    return _clipped(optimizer, max_grad_norm)


def sgd(
    *,
    learning_rate: Rate,
    param_axes: ParamAxes,
    momentum: Decay | None = None,
    nesterov: bool = False,
    weight_decay: NonNegative = 0.0,
    coupled: bool = False,
    no_decay: Sequence[str] = (),
    max_grad_norm: Positive | None = None,
) -> optax.GradientTransformation:
    """Stochastic gradient descent, with heavy-ball momentum unless `momentum` is None.

    Args:
      nesterov: use Nesterov momentum (Sutskever et al., 2013).
      coupled: add decay to the gradient, and so to its moving average, as in recipes for vision; else
        apply it after the momentum, as in AdamW.

    Raises:
      ValueError: `nesterov` without `momentum`.
    """
    if nesterov and not momentum:
        raise ValueError(
            "sgd: nesterov has no effect without momentum: set momentum, or remove it."
        )
    steps = [
        optax.trace(momentum, nesterov=nesterov) if momentum else optax.identity(),
        optax.add_decayed_weights(weight_decay, _decay_mask(param_axes, no_decay)),
    ]
    ordered = reversed(steps) if coupled else steps
    optimizer = optax.chain(*ordered, optax.scale_by_learning_rate(learning_rate))
    return _clipped(optimizer, max_grad_norm)
