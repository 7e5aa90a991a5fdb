"""The one train step: gradients of a summed loss, divided once by the summed weight.

Numerators and weights are added over microbatches before the division, so accumulation, padding and
packing do not change the gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainers import anomaly as anomaly_lib
from trainers import trainable
from trainers.moving_reference import MOVES, MovingReference
from trainers.objectives.base import Batch, LossFn, LossOut, Metrics, Objective
from trainers.train_state import TrainState

# (state, batch, extras of the objective) -> (state, metrics); extras are optional.
TrainStep = Callable[..., tuple[TrainState, Metrics]]
# (optimiser's state, trained parameters) -> the parameters to evaluate and to release
Averaged = Callable[[Any, Any], Any]


def make_train_step(
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    seed: int = 0,
    mask: Any = None,
    microbatches: int = 1,
    gradient_dtype: str | None = None,
    ema_decay: float | None = None,
    averaged: Averaged | None = None,
    anomaly: anomaly_lib.Anomaly | None = None,
    moving_reference: MovingReference | None = None,
) -> TrainStep:
    """Returns a pure function (state, batch) -> (state, metrics), to be jitted with the state donated.

    Args:
      loss_fn: the objective. The step takes its extras as the keyword `extras`; without it they become constants of the
        compiled step.
      optimizer: over the trainable parameters only.
      seed: base of the randomness; step s uses fold_in(key(seed), s).
      mask: tree of bools over params, True where trained; None trains everything.
      microbatches: equal parts the batch's rows are processed in, one after the other.
      gradient_dtype: differentiate a copy of the parameters in this dtype, which also stores the gradients in it (half the
        memory in bfloat16); None differentiates the parameters.
      ema_decay: decay of an exponential average of the parameters in state.ema_params.
      averaged: in its place, what makes state.ema_params of the optimiser's state and the trained parameters.
      anomaly: bad updates are not applied; its statistics live in state.variables.
      moving_reference: moves the objective's extras, the parameters of a reference; its moves live in state.variables.

    Returns:
      The step. Its metrics are the objective's, summed, and 'grad_norm' before clipping, 'param_norm', 'update_norm' and,
      with `anomaly`, 'anomaly' (1 for a dropped update). 'update_norm' is the norm of the update that was applied: of
      parameters narrower than float32, of the difference between the stored ones after and before the step.
    """

    objective = Objective.of(loss_fn)

    def gradients(
        params: Any, batch: Batch, rng: jax.Array, variables: dict[str, Any], extras: Any
    ) -> tuple[Any, LossOut, dict[str, Any]]:
        """Returns gradients, the loss without its variables, and all variables after it."""
        trained, frozen = trainable.split(params, mask)
        if gradient_dtype is not None:
            trained = _cast_floats(trained, gradient_dtype)

        def loss(trained):
            whole = trainable.join(trained, frozen)
            out = objective(whole, batch, rng, variables=variables, extras=extras)
            return out.sum, out

        grads, out = jax.grad(loss, has_aux=True)(trained)
        return grads, dataclasses.replace(out, variables=None), _updated(variables, out.variables)

    def accumulated(
        params: Any, batch: Batch, rng: jax.Array, variables: dict[str, Any], extras: Any
    ) -> tuple[Any, LossOut, dict[str, Any]]:
        if microbatches == 1:
            return gradients(params, batch, rng, variables, extras)
        parts = _parts(batch, microbatches)

        def body(carry, xs):
            (total, variables), (part, index) = carry, xs
            key = jax.random.fold_in(rng, index)
            grads, out, variables = gradients(params, part, key, variables, extras)
            wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)
            return (jax.tree.map(jnp.add, total, (wide, out)), variables), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, params, first, rng, variables, extras)[:2]
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
        )
        xs = (parts, jnp.arange(microbatches))
        ((grads, out), variables), _ = jax.lax.scan(body, (zeros, variables), xs)
        return grads, out, variables

    def step(state: TrainState, batch: Batch, extras: Any = None) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, out, written = accumulated(
            state.params,
            batch,
            rng,
            _of_the_model(state.variables),
            _present(extras, state.variables, moving_reference),
        )
        # A batch of padding alone has weight 0 and gradient 0; it must not divide 0 by 0.
        divisor = jnp.where(out.weight > 0, out.weight, 1.0)
        trained, frozen = trainable.split(state.params, mask)
        grads = jax.tree.map(lambda g, p: (g / divisor).astype(p.dtype), grads, trained)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        new_trained = optax.apply_updates(trained, updates)
        params = trainable.join(new_trained, frozen)
        ema_params = state.ema_params
        if ema_decay is not None:
            ema_params = jax.tree.map(
                # In this form the average of constant parameters equals them exactly.
                lambda e, p: (e + (1 - ema_decay) * (p.astype(e.dtype) - e)).astype(e.dtype),
                ema_params,
                params,
            )
        elif averaged is not None:
            average = trainable.join(averaged(opt_state, new_trained), frozen)
            ema_params = jax.tree.map(lambda e, a: a.astype(e.dtype), ema_params, average)
        variables = {**state.variables, **written}
        if moving_reference is not None:
            variables[MOVES] = moving_reference.moved(
                extras, state.variables[MOVES], params, state.step + 1
            )
        metrics: Metrics = dict(out.metrics)

        if anomaly is not None:
            good, statistics = anomaly.judge(
                state.variables[anomaly_lib.STATISTICS], out.sum / divisor, grad_norm
            )
            params, opt_state, ema_params, variables = jax.tree.map(
                lambda new, old: jnp.where(good, new, old),
                (params, opt_state, ema_params, variables),
                (state.params, state.opt_state, state.ema_params, dict(state.variables)),
            )
            variables[anomaly_lib.STATISTICS] = statistics
            metrics["anomaly"] = _scalar(1.0 - good.astype(jnp.float32))

        metrics["grad_norm"] = _scalar(grad_norm)
        applied = optax.tree.norm(jax.tree.map(_applied, new_trained, trained, updates))
        dropped = metrics["anomaly"][0] if anomaly is not None else jnp.zeros(())
        metrics["update_norm"] = _scalar(jnp.where(dropped > 0, 0.0, applied))
        metrics["param_norm"] = _scalar(optax.tree.norm(params))
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema_params=ema_params,
            variables=variables,
        )
        return new_state, metrics

    return step


def make_eval_step(
    *, loss_fn: LossFn, microbatches: int = 1, moving_reference: MovingReference | None = None
) -> Callable[..., Metrics]:
    """Returns a pure function (params, batch, variables=None, extras=None) -> metrics, summed over the batch.

    Args:
      loss_fn: the objective, which gets no rng.
      microbatches: parts as in training, so that evaluation needs no more memory; for a batch of another size, the greatest
        common divisor of both.
      moving_reference: as in training.
    """
    objective = Objective.of(loss_fn)

    def evaluate(
        params: Any, batch: Batch, variables: Mapping[str, Any] | None = None, extras: Any = None
    ) -> Metrics:
        present = _present(extras, variables or {}, moving_reference)

        def metrics(part: Batch) -> Metrics:
            collections = _of_the_model(variables or {})
            return objective(params, part, None, variables=collections, extras=present).metrics

        count = math.gcd(jax.tree.leaves(batch)[0].shape[0], microbatches)
        if count == 1:
            return metrics(batch)
        return jax.tree.map(lambda x: x.sum(0), jax.lax.map(metrics, _parts(batch, count)))

    return evaluate


def _parts(batch: Batch, count: int) -> Any:
    """Returns the batch's rows in `count` microbatches, stacked."""
    # Row r goes to microbatch r % M, so that each microbatch is spread over all devices.
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _of_the_model(variables: Mapping[str, Any]) -> dict[str, Any]:
    others = (anomaly_lib.STATISTICS, MOVES)
    return {name: tree for name, tree in variables.items() if name not in others}


def _present(extras: Any, variables: Mapping[str, Any], moving: MovingReference | None) -> Any:
    """Returns the extras that the objective reads now."""
    return extras if moving is None else moving.reference(extras, variables)


def _updated(variables: Mapping[str, Any], written: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns `variables` with the collections that an objective wrote; raises ValueError if the state holds no such one."""
    unknown = sorted(set(written or {}) - set(variables))
    if unknown:
        raise ValueError(
            f"The objective writes the collections {unknown}, but the state holds "
            f"{sorted(variables)}: a collection must be created by the model's init."
        )
    return {**variables, **(written or {})}


def _scalar(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a metric of the whole step, with weight one."""
    return value.astype(jnp.float32), jnp.ones((), jnp.float32)


def _applied(new: jax.Array, old: jax.Array, update: jax.Array) -> jax.Array:
    """Returns what an update has changed: of float32 parameters itself, so that they can be updated in place."""
    if new.dtype.itemsize >= 4:
        return update
    wide, info = jnp.promote_types(new.dtype, jnp.float32), jnp.finfo(new.dtype)
    # XLA drops a conversion to a narrow dtype and back (xla_allow_excess_precision), but not an explicit rounding.
    stored = jax.lax.reduce_precision(new.astype(wide), info.nexp, info.nmant)
    return stored - old.astype(wide)


def _cast_floats(tree: Any, dtype: str) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
