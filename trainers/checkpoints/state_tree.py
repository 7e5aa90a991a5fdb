"""Converts states to flat dicts of named arrays, and to the nested dicts of checkpoints."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

Flat = dict[str, Any]


def flatten(tree: Any) -> Flat:
    """Returns the leaves of any pytree by path, such as `opt_state/0/mu/final_norm/scale`.

    Nodes without leaves (None, empty optimiser states) do not appear.

    Raises:
      ValueError: two leaves have the same path, or a key contains a slash.
    """
    flat: Flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        name = "/".join(parts)
        if name in flat or any(not part or "/" in part for part in parts):
            raise ValueError(
                f"{name!r} cannot name an array of a checkpoint: keys are unique, not empty and "
                "without slashes."
            )
        flat[name] = leaf
    return flat


def flatten_arrays(tree: Any) -> Flat:
    """Returns the leaves of a state to save, by path.

    Raises:
      TypeError: a leaf is not a numeric jax.Array.
    """
    flat = flatten(tree)
    for name, leaf in flat.items():
        is_array = isinstance(leaf, jax.Array)
        if not is_array or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            kind = leaf.dtype if is_array else type(leaf).__name__
            raise TypeError(
                f"{name} is {kind}: a saved state may hold only numeric jax.Arrays (random keys as "
                "jax.random.key_data)."
            )
    return flat


def unflatten(flat: Mapping[str, Any], like: Any) -> Any:
    """Returns a tree with the structure of `like` and the leaves of `flat`."""
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in flatten(like)])


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts with one level per part of a path."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
