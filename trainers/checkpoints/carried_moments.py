"""Carries an optimiser's moments through a transform of the parameters.

Moments are matched by name: an optimiser around another (clipping, decay of factors) has them at other
paths of its state.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from model.transforms.base import MomentTransform, Power, TreeTransform
from trainers.checkpoints import state_tree
from trainers.checkpoints.array_files import read_verified
from trainers.checkpoints.manifest import Manifest
from trainers.checkpoints.restore_params import (
    CheckpointMismatchError,
    as_saved,
)

# Names in optax's states, and which moment of the gradient the leaves below them are.
_POWERS: Mapping[str, Power] = {"mu": "first", "trace": "first", "nu": "second"}


def carried(
    step: epath.Path,
    recorded: Manifest,
    opt_state: Any,
    transform: TreeTransform | None,
    source: Any,
    params: Any,
) -> Any:
    """Returns the optimiser's state with the checkpoint's moments, transformed.

    Args:
      step: the step directory.
      recorded: its manifest.
      opt_state: a fresh state of this run's optimiser.
      transform: made `params` from `source`.
      source: the checkpoint's parameters.
      params: the new parameters.

    Raises:
      ValueError: the optimiser or the transform does not allow it.
      CheckpointMismatchError: the checkpoint has no such moments.
    """
    ours = state_tree.flatten({"opt_state": opt_state})
    trees = {
        match[1]: match[2]
        for name in ours
        if (match := re.fullmatch(rf"(.*/({'|'.join(_POWERS)}))/.+", name))
    }
    others = [
        name
        for name, leaf in ours.items()
        if leaf.ndim and not any(name.startswith(f"{tree}/") for tree in trees)
    ]
    if not trees or others or not isinstance(transform, MomentTransform):
        raise ValueError(
            f"INITIAL_MOMENTS = 'carry': {others[0] if others else 'the state'} of this optimiser has no "
            "image under the transform; use 'reset'."
        )
    theirs = {tree: _tree_named(recorded, kind, step) for tree, kind in trees.items()}
    like = state_tree.flatten(source)
    wanted, counts = {}, {}
    for tree in trees:
        for name, leaf in like.items():
            stored = f"{theirs[tree]}/{name}"
            wanted[stored] = as_saved(recorded, stored, leaf)
        count, stored = (f"{x.rpartition('/')[0]}/count" for x in (tree, theirs[tree]))
        if count in ours and stored in recorded.arrays:
            counts[count] = stored
            wanted[stored] = as_saved(recorded, stored, ours[count])
    arrays = read_verified(step, recorded, wanted)
    new = {**ours, **{count: arrays[stored] for count, stored in counts.items()}}
    for tree, kind in trees.items():
        moments = state_tree.nest({name: arrays[f"{theirs[tree]}/{name}"] for name in like})
        made = transform.moments(moments, params, power=_POWERS[kind])
        for name, value in state_tree.flatten(made).items():
            leaf = ours[f"{tree}/{name}"]
            new[f"{tree}/{name}"] = jax.device_put(value.astype(leaf.dtype), leaf.sharding)
    return state_tree.unflatten(new, {"opt_state": opt_state})["opt_state"]


def _tree_named(recorded: Manifest, kind: str, step: epath.Path) -> str:
    """Returns the path of the checkpoint's moments of this kind."""
    paths = {
        match[1]
        for name in recorded.arrays
        if (match := re.fullmatch(rf"(opt_state/(?:.*/)?{kind})/.+", name))
    }
    if len(paths) != 1:
        raise CheckpointMismatchError(
            f"checkpoint {step} has {len(paths)} sets of moments {kind!r} where this optimiser has one: "
            "INITIAL_MOMENTS = 'reset' begins with none."
        )
    return paths.pop()
