"""Starting a run from the checkpoint of another model, by a tree transform of its parameters.

The step, and with it the place in a schedule, is that of the checkpoint, and so are the collections that both
models have, but for the statistics of losses: those of a model that has been transformed are others. Moments
begin anew or go through the transform too, by name: an optimiser around another (clipping, decay of factors)
keeps them at other paths of its state.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from model.transforms.base import MomentTransform, Power, TreeTransform
from trainers.checkpoints import phase_state, state_tree, step_dir
from trainers.checkpoints.array_files import read_verified
from trainers.checkpoints.initial import InitialCheckpoint
from trainers.checkpoints.manifest import Manifest
from trainers.checkpoints.restore_params import (
    CheckpointMismatchError,
    as_saved,
    kept_variables,
    restore_params,
)

# Of optax's states: what a leaf below this name is of a gradient.
_POWERS: Mapping[str, Power] = {"mu": "first", "trace": "first", "nu": "second"}


def restore_transformed(initial: InitialCheckpoint, state: Any) -> tuple[Any, epath.Path]:
    """Returns a state with transformed parameters, at the checkpoint's step, and that step's directory.

    A moving average begins with the new parameters.

    Args:
      initial: with a path and a transform.
      state: a fresh TrainState of the new model.

    Raises:
      ValueError: the transform refuses the parameters, or moments cannot be carried.
      DamagedCheckpointError, CheckpointMismatchError, FileNotFoundError.
    """
    path, transform = initial.path, initial.transform
    assert path is not None and transform is not None

    def read(step: epath.Path) -> tuple[Any, epath.Path]:
        recorded = step_dir.read_manifest(step)
        root = "ema_params/" if initial.use_ema else "params/"
        saved = {
            name.removeprefix(root): tuple(entry.shape)
            for name, entry in recorded.arrays.items()
            if name.startswith(root)
        }
        source = restore_params(
            step,
            transform.source(state.params, saved),
            assignment=initial.assignment,
            strict=initial.strict,
            use_ema=initial.use_ema,
        )
        params = transform(source, state.params)
        made = state.replace(params=params, variables=kept_variables(step, state.variables))
        if state.ema_params is not None:
            made = made.replace(
                ema_params=jax.tree.map(
                    lambda p, e: jnp.array(p, e.dtype, copy=True), params, state.ema_params
                )
            )
        if initial.moments == "carry":
            carried = _carried(step, recorded, state.opt_state, transform, source, params)
            made = made.replace(opt_state=carried)
        return phase_state.at_step(made, step_dir.read_record(step, recorded)["step"]), step

    return step_dir.newest_good(path, read)


def _carried(
    step: epath.Path,
    recorded: Manifest,
    opt_state: Any,
    transform: TreeTransform,
    source: Any,
    params: Any,
) -> Any:
    """The optimiser's state with the moments of the checkpoint's, transformed."""
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
    found = read_verified(step, recorded, wanted)
    new = {**ours, **{count: found[stored] for count, stored in counts.items()}}
    for tree, kind in trees.items():
        moments = state_tree.nest({name: found[f"{theirs[tree]}/{name}"] for name in like})
        made = transform.moments(moments, params, power=_POWERS[kind])
        for name, value in state_tree.flatten(made).items():
            leaf = ours[f"{tree}/{name}"]
            new[f"{tree}/{name}"] = jax.device_put(value.astype(leaf.dtype), leaf.sharding)
    return state_tree.unflatten(new, {"opt_state": opt_state})["opt_state"]


def _tree_named(recorded: Manifest, kind: str, step: epath.Path) -> str:
    """The path of the checkpoint's moments of this kind."""
    found = {
        match[1]
        for name in recorded.arrays
        if (match := re.fullmatch(rf"(opt_state/(?:.*/)?{kind})/.+", name))
    }
    if len(found) != 1:
        raise CheckpointMismatchError(
            f"checkpoint {step} has {len(found)} sets of moments {kind!r} where this optimiser has one: "
            "INITIAL_MOMENTS = 'reset' begins with none."
        )
    return found.pop()
