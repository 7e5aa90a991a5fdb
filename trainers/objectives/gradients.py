"""The gradient of an objective over a batch, whose rows are processed in equal parts, the microbatches."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from espalier.trainers import trainable
from espalier.trainers.objectives.base import Batch, LossOut, Objective

# (params, batch, rng, the model's collections, extras) -> gradients, loss without collections, collections after it
Gradients = Callable[
    [Any, Batch, jax.Array, dict[str, Any], Any], tuple[Any, LossOut, dict[str, Any]]
]


def make_gradients(
    objective: Objective,
    *,
    mask: Any = None,
    microbatches: int = 1,
    gradient_dtype: str | None = None,
) -> Gradients:
    """Returns a function that computes the gradient of the summed loss to the trained parameters, and the loss.

    Each microbatch reads the collections that the one before wrote. Sums are float32, and of counts int32.

    Args:
      mask, microbatches, gradient_dtype: see `trainers.step.make_train_step`.
    """

    def gradients(
        params: Any, batch: Batch, rng: jax.Array, variables: dict[str, Any], extras: Any
    ) -> tuple[Any, LossOut, dict[str, Any]]:
        trained, frozen = trainable.split(params, mask)
        if gradient_dtype is not None:
            trained = _cast_floats(trained, gradient_dtype)

        def loss(trained: Any) -> tuple[jax.Array, LossOut]:
            whole = trainable.join(trained, frozen)
            out = objective(whole, batch, rng, variables=variables, extras=extras)
            return out.sum, out

        grads, out = jax.grad(loss, has_aux=True)(trained)
        return grads, dataclasses.replace(out, variables=None), _updated(variables, out.variables)

    def accumulated(
        params: Any, batch: Batch, rng: jax.Array, variables: dict[str, Any], extras: Any
    ) -> tuple[Any, LossOut, dict[str, Any]]:
        parts = in_parts(batch, microbatches)

        def body(carry: Any, xs: Any) -> tuple[Any, None]:
            (total, variables), (part, index) = carry, xs
            key = jax.random.fold_in(rng, index)
            grads, out, variables = gradients(params, part, key, variables, extras)
            wide = jax.tree.map(lambda g: g.astype(_wide(g.dtype)), grads)
            return (jax.tree.map(jnp.add, total, (wide, out)), variables), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, params, first, rng, variables, extras)[:2]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, _wide(s.dtype)), shapes)
        xs = (parts, jnp.arange(microbatches))
        ((grads, out), variables), _ = jax.lax.scan(body, (zeros, variables), xs)
        return grads, out, variables

    return gradients if microbatches == 1 else accumulated


def in_parts(batch: Batch, count: int) -> Any:
    """Returns the batch's rows in `count` microbatches, stacked."""
    # Row r goes to microbatch r % M, so that each microbatch is spread over all devices.
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _updated(variables: Mapping[str, Any], written: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns `variables` with the collections that an objective wrote; raises ValueError if the state holds no such one."""
    unknown = sorted(set(written or {}) - set(variables))
    if unknown:
        raise ValueError(
            f"The objective writes the collections {unknown}, but the state holds "
            f"{sorted(variables)}: a collection must be created by the model's init."
        )
    return {**variables, **(written or {})}


def _wide(dtype: Any) -> Any:
    """Returns the dtype of a sum: at least float32, and of integers theirs."""
    return dtype if jnp.issubdtype(dtype, jnp.integer) else jnp.promote_types(dtype, jnp.float32)


def _cast_floats(tree: Any, dtype: str) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
