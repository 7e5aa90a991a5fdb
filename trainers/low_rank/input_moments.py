"""Second moments of the inputs of projections over data, the weights of a data-aware decomposition."""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.bars import Bar
from espalier.model.linear import Dense
from espalier.trainers.checkpoints import state_tree

_NAME = "input_moments"


def input_moments(
    model: Any, params: Any, batches: Iterable[jax.Array], *, total: int | None = None
) -> dict[str, jax.Array]:
    """Returns the sum of x^T x over all tokens for each `Dense`, by its path, float32 [..., X, X], stacked like its kernel.

    There are none for experts, which are not `Dense`.

    Args:
      model: a decoder-only module.
      batches: tokens_BT without padding, all of one shape.
      total: number of batches, for the progress bar.
    """

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Dense) and context.method_name == "__call__":
            rows = args[0].reshape(-1, args[0].shape[-1]).astype(jnp.float32)
            exact = jax.lax.Precision.HIGHEST
            context.module.sow("intermediates", _NAME, jnp.matmul(rows.T, rows, precision=exact))
        return call(*args, **kwargs)

    @jax.jit
    def moments(params: Any, tokens_BT: jax.Array) -> Any:
        with nn.intercept_methods(note):
            _, written = model.apply(
                {"params": params}, tokens_BT, method="hidden", mutable=["intermediates"]
            )
        return {
            name.partition(f"/{_NAME}/")[0]: leaf
            for name, leaf in state_tree.flatten(written["intermediates"]).items()
            if f"/{_NAME}/" in name
        }

    sums: dict[str, jax.Array] | None = None
    for tokens_BT in Bar(batches, total=total, desc="calibrate", unit="batch", leave=False):
        more = moments(params, tokens_BT)
        sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
    return sums or {}
