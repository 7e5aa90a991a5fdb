"""The one train step: gradients of a summed loss, divided once by the summed weight.

Numerators and weights are added over microbatches before the division, so accumulation, padding and
packing do not change the gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from espalier.trainers import trainable
from espalier.trainers.extensions import (
    StepExtension,
    Update,
    gated,
    of_model,
    present_extras,
    with_constants,
)
from espalier.trainers.objectives.base import Batch, LossFn, Metrics, Objective
from espalier.trainers.objectives.gradients import in_parts, make_gradients
from espalier.trainers.train_state import TrainState

# (state, batch, extras of the objective) -> (state, metrics); extras are optional.
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    seed: int = 0,
    mask: Any = None,
    microbatches: int = 1,
    gradient_dtype: str | None = None,
    extensions: Sequence[StepExtension] = (),
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
      extensions: what else the state holds and the step does, see trainers/extensions.py.

    Returns:
      The step. Its metrics are the objective's, summed, and 'grad_norm' before clipping, 'param_norm', 'update_norm' and,
      with an extension that judges updates, 'anomaly' (1 for a dropped update). 'update_norm' is the norm of the update that
      was applied: of parameters narrower than float32, of the difference between the stored ones after and before the step.
    """
    gradients = make_gradients(
        Objective.of(loss_fn), mask=mask, microbatches=microbatches, gradient_dtype=gradient_dtype
    )

    def step(state: TrainState, batch: Batch, extras: Any = None) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        collections = of_model(extensions, state.variables)
        present = present_extras(extensions, extras, state.variables)
        grads, out, collections = gradients(state.params, batch, rng, collections, present)
        # A batch of padding alone has weight 0 and gradient 0; it must not divide 0 by 0.
        divisor = jnp.where(out.weight > 0, out.weight, 1.0)
        trained, frozen = trainable.split(state.params, mask)
        grads = jax.tree.map(lambda g, p: (g / divisor).astype(p.dtype), grads, trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        update = Update(
            step=state.step + 1,
            trained=optax.apply_updates(trained, updates),
            frozen=frozen,
            opt_state=opt_state,
            extras=extras,
            loss=out.sum / divisor,
            grad_norm=_norm(grads),
            counts=out.counts,
        )
        update = with_constants(extensions, update)
        parts = {
            each.name: each.update(part, update)
            for each in extensions
            if (part := state.part(each.name)) is not None
        }
        after = dataclasses.replace(
            state, step=update.step, params=update.params, opt_state=opt_state
        ).with_parts({**collections, **parts})
        after, good = gated(extensions, update, state, after)

        applied = optax.tree.norm(jax.tree.map(_applied, update.trained, trained, updates))
        metrics: Metrics = {
            **out.metrics,
            "grad_norm": _scalar(update.grad_norm),
            "update_norm": _scalar(applied if good is None else jnp.where(good, applied, 0.0)),
            "param_norm": _scalar(_norm(after.params)),
        }
        if good is not None:
            metrics["anomaly"] = _scalar(1.0 - good.astype(jnp.float32))
        return after, metrics

    return step


def make_eval_step(
    *, loss_fn: LossFn, microbatches: int = 1, extensions: Sequence[StepExtension] = ()
) -> Callable[..., Metrics]:
    """Returns a pure function (params, batch, variables=None, extras=None) -> metrics, summed over the batch.

    Args:
      loss_fn: the objective, which gets no rng.
      microbatches: parts in which training processes a batch. Evaluation uses as many, or their greatest common divisor
        with the rows of a batch, so that it needs no more memory.
      extensions: what else the state holds, see trainers/extensions.py.
    """
    objective = Objective.of(loss_fn)

    def evaluate(
        params: Any, batch: Batch, variables: Mapping[str, Any] | None = None, extras: Any = None
    ) -> Metrics:
        collections = of_model(extensions, variables or {})
        present = present_extras(extensions, extras, variables or {})

        def metrics(part: Batch) -> Metrics:
            return objective(params, part, None, variables=collections, extras=present).metrics

        count = math.gcd(jax.tree.leaves(batch)[0].shape[0], microbatches)
        if count == 1:
            return metrics(batch)
        return jax.tree.map(lambda x: x.sum(0), jax.lax.map(metrics, in_parts(batch, count)))

    return evaluate


def _scalar(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a metric of the whole step, with weight one."""
    return value.astype(jnp.float32), jnp.ones((), jnp.float32)


def _norm(tree: Any) -> jax.Array:
    """Returns the norm of all arrays of a tree, computed in float32 or wider."""
    wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
    return optax.tree.norm(wide)


def _applied(new: jax.Array, old: jax.Array, update: jax.Array) -> jax.Array:
    """Returns what an update has changed: of float32 parameters itself, so that they can be updated in place."""
    if new.dtype.itemsize >= 4:
        return update
    wide, info = jnp.promote_types(new.dtype, jnp.float32), jnp.finfo(new.dtype)
    # XLA drops a conversion to a narrow dtype and back (xla_allow_excess_precision), but not an explicit rounding.
    stored = jax.lax.reduce_precision(new.astype(wide), info.nexp, info.nmant)
    return stored - old.astype(wide)
