"""What the layers of a model sow during a step, as part of a loss and as metrics. Shapes: L layers, '...' of one value."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_LAYER = re.compile(r"layers/block_\d+/")


def layer_means(sown: Mapping[str, Any], *, scanned: bool) -> dict[str, jax.Array]:
    """Means over layers by name: of layers/block_0/mlp/load, .../block_1/mlp/load, ... as mlp/load.

    Args:
      sown: a collection of values of any shape, the same in every layer.
      scanned: whether those of the layers are stacked, [L, ...].
    """
    by_name: dict[str, list[jax.Array]] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(sown):
        # A module sows tuples: the last key is the place in it.
        where = "/".join(str(key.key) for key in path[:-1])
        name = _LAYER.sub("", where)
        stacked = scanned and name != where
        by_name.setdefault(name, []).append(value if stacked else value[None])
    return {name: jnp.concatenate(values).mean(0) for name, values in by_name.items()}


def added(
    written: Mapping[str, Any], weight: jax.Array, *, scanned: bool
) -> tuple[jax.Array | float, dict[str, tuple[jax.Array, jax.Array]]]:
    """What is added to a loss of this weight, and metrics: 'auxiliary_loss', and what layers report.

    Args:
      written: the collections 'losses', whose values are means over the batch, and 'metrics'.
      weight: of the batch.
      scanned: see `layer_means`.
    """
    total, metrics = 0.0, {}
    if auxiliary := jax.tree.leaves(written.get("losses")):
        total = weight * sum(value.astype(jnp.float32).sum() for value in auxiliary)
        metrics["auxiliary_loss"] = (total, weight)
    for name, value in layer_means(written.get("metrics", {}), scanned=scanned).items():
        metrics[name] = (weight * value, jnp.full_like(value, weight))
    return total, metrics
