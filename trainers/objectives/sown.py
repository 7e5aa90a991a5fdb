"""What the layers of a model sow during a step, as metrics. Shapes: L layers, '...' of one value."""

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
