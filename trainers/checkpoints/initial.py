"""The checkpoint that a new run starts from, which parts of it the run uses, and how another model's is transformed.

A tree transform makes parameters, and optimiser moments that are matched by name: in an optimiser that wraps another
(clipping, decay of factors) their paths differ.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from etils import epath

from espalier.model.transforms import base
from espalier.model.transforms.base import Power, Recipe, Source, TreeTransform
from espalier.trainers.checkpoints import base_step, state_tree
from espalier.trainers.checkpoints.array_files import read_verified, sharding_of
from espalier.trainers.checkpoints.manifest import Manifest
from espalier.trainers.checkpoints.restore_params import (
    Assignment,
    CheckpointMismatchError,
    ComputedCheckpoint,
    as_saved,
    is_added,
    restore_params,
)

Scope = Literal["params", "phase", "state"]
Data = Literal["restart", "continue"]
Moments = Literal["reset", "carry"]
_log = logging.getLogger(__name__)
# Names in optax's states, and the moment of the gradient in the leaves below each.
_POWERS: Mapping[str, Power] = {"mu": "first", "trace": "first", "nu": "second"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialCheckpoint:
    """The checkpoint that a run starts from if it has no checkpoint of its own.

    Attributes:
      path: a step directory, or a run directory for its newest good step; None for new parameters.
      scope: 'params' restores the model's variables (step 0, fresh optimiser). 'phase' also restores
        moving averages and the optimiser's moments, at step 0 of a new schedule. 'state' also restores
        the step and the place in the schedule, as if both were the same run.
      data: 'restart' reads every source from its beginning; 'continue' reads each source from where the
        checkpoint's run stopped, whatever the mixture. (Scope 'state' continues with the next batch.)
      assignment, strict, use_ema: with 'params', see `restore_params`.
      added: with 'params', patterns of parameters that keep their initial values if the checkpoint lacks them, such as
        adapters.
      base_apart: whether the run's own checkpoints have its adapters without the frozen base model, which is read from here
        whenever one of them is (base_step.py).
      transform: transforms the checkpoint's parameters to this model's (model/transforms/base.py).
      moments: with `transform`, 'reset' uses fresh optimiser moments, 'carry' transforms the checkpoint's.
      computed: opens a checkpoint that is computed from several, `path` among them, whose parameters are taken instead of
        those in `path`; with 'params', `transform` applies to them. All else is as in `path`.
    """

    path: str | os.PathLike | None = None
    scope: Scope = "params"
    data: Data = "restart"
    assignment: Assignment = ()
    strict: bool = True
    use_ema: bool = False
    added: Sequence[str] = ()
    base_apart: bool = False
    transform: TreeTransform | None = None
    moments: Moments = "reset"
    computed: Callable[[], ComputedCheckpoint] | None = None

    def check(self) -> None:
        """Raises ValueError for unknown values and for options that exclude each other."""
        if self.path == "":
            raise ValueError(
                "INITIAL_CHECKPOINT_PATH is '': give a directory, or None for new parameters."
            )
        for name, value, kind in (
            ("INITIAL_SCOPE", self.scope, Scope),
            ("INITIAL_DATA", self.data, Data),
            ("INITIAL_MOMENTS", self.moments, Moments),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{name} = {value!r}: use {', '.join(map(repr, get_args(kind)))}.")
        if not self.path and (self.scope != "params" or self.data == "continue"):
            raise ValueError(
                f"INITIAL_SCOPE = {self.scope!r} and INITIAL_DATA = {self.data!r} continue another "
                "run: set INITIAL_CHECKPOINT_PATH to its directory."
            )
        if self.data == "continue" and self.scope == "state":
            raise ValueError(
                "INITIAL_SCOPE = 'state' continues with the next batch of the same stream: use "
                "INITIAL_DATA = 'restart', or INITIAL_SCOPE = 'phase' for another mixture."
            )
        options = {
            "InitialCheckpoint.assignment": bool(self.assignment),
            "InitialCheckpoint.strict = False": not self.strict,
            "InitialCheckpoint.use_ema": self.use_ema,
        }
        if self.scope != "params" and any(options.values()):
            raise ValueError(
                f"INITIAL_SCOPE = {self.scope!r} restores a whole state, so "
                f"{', '.join(name for name, is_set in options.items() if is_set)} would have no "
                "effect: remove this setting, or use INITIAL_SCOPE = 'params'."
            )
        if self.base_apart and (not self.path or self.transform is not None or self.assignment):
            raise ValueError(
                "BASE_APART reads the base model from INITIAL_CHECKPOINT_PATH, as it is there: set this path, and no "
                "INITIAL_TRANSFORM or InitialCheckpoint.assignment."
            )
        refused = {
            "InitialCheckpoint.use_ema": self.use_ema,
            "BASE_APART": self.base_apart,
            "INITIAL_CHECKPOINT_PATH = None": not self.path,
            "INITIAL_TRANSFORM": self.transform is not None and self.scope != "params",
        }
        if self.computed is not None and any(refused.values()):
            raise ValueError(
                f"The parameters of {self.computed!r} are computed from several checkpoints as the run starts, so "
                f"{', '.join(name for name, is_set in refused.items() if is_set)} cannot be had: remove this setting, or write "
                "the checkpoint first and start from it."
            )
        if self.transform is not None and not self.path:
            raise ValueError(
                "INITIAL_TRANSFORM changes the parameters of a checkpoint: set "
                "INITIAL_CHECKPOINT_PATH."
            )
        if self.moments == "carry" and (self.transform is None or self.scope == "params"):
            raise ValueError(
                "INITIAL_MOMENTS = 'carry' needs an INITIAL_TRANSFORM, and INITIAL_SCOPE = 'phase' or "
                "'state': the scope 'params' restores no moments."
            )


NEW_PARAMETERS = InitialCheckpoint()


def transformed(
    step: epath.Path,
    recorded: Manifest,
    state: Any,
    transform: TreeTransform,
    initial: InitialCheckpoint,
    computed: ComputedCheckpoint | None = None,
) -> Any:
    """Returns a fresh state with transformed parameters and, if `initial.moments` is 'carry', moments.

    Args:
      step: the step directory.
      recorded: its manifest.
      state: a fresh TrainState of the new model.
      transform: a transform of one source, see model/transforms/base.py.
      initial: options.
      computed: parameters to transform instead of the step's.

    Raises:
      TransformError: the transform does not support the checkpoint.
      ValueError: the moments cannot be transformed.
      DamagedCheckpointError, CheckpointMismatchError.
    """
    which = "ema" if initial.use_ema else "raw"
    entries = computed.entries if computed else base_step.entries(step, recorded, which)
    saved = {name: tuple(entry.shape) for name, entry in entries.items()}
    everything = state_tree.flatten(state.params)
    fresh = {
        name: leaf
        for name, leaf in everything.items()
        if name in saved or not is_added(name, initial.added)
    }
    recipes, inputs = plan_transform(transform, saved, fresh)
    # `restore_params` checks the checkpoint's parameters by `assignment` and `strict`.
    source = state_tree.flatten(
        restore_params(
            step,
            state_tree.nest(inputs),
            assignment=initial.assignment,
            strict=initial.strict,
            use_ema=initial.use_ema,
            computed=computed,
        )
    )
    params = base.apply(recipes, lambda _, name: source[name])
    params = {
        name: jax.device_put(jnp.asarray(params[name], leaf.dtype), sharding_of(leaf))
        for name, leaf in fresh.items()
    }
    params = {**everything, **params}
    _log.info("initial parameters from %s:\n%s", step, "\n".join(base.table(recipes)))
    new = state.replace(params=state_tree.unflatten(params, state.params))
    if initial.moments == "carry":
        new = new.replace(
            opt_state=_carried(step, recorded, state.opt_state, recipes, source, params)
        )
    return new


def plan_transform(
    transform: TreeTransform, saved: base.Shapes, target: state_tree.Flat
) -> tuple[list[Recipe], state_tree.Flat]:
    """Returns the recipes of a transform, and the abstract arrays that they read from the checkpoint, by path.

    Args:
      transform: a transform of one source.
      saved: shapes of the checkpoint's parameters, by path.
      target: the new model's parameters or their shapes, by path.

    Raises:
      TransformError: the transform does not support the checkpoint.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in target.items()}
    recipes = transform.plan([Source("the checkpoint", saved)], shapes)
    base.check_target(recipes, shapes)
    wanted: state_tree.Flat = {}
    for recipe in recipes:
        leaves = [target[name] for name in recipe.outputs]
        names = [name for _, name in recipe.inputs]
        if recipe.abstract_inputs:
            wanted.update(zip(names, recipe.abstract_inputs(leaves), strict=True))
            continue
        like = leaves[0]
        for name in names:
            shape = saved.get(name, like.shape)
            # An input whose shape differs from the output's is replicated.
            whole = jax.ShapeDtypeStruct(shape, like.dtype, sharding=_replicated(like))
            wanted[name] = like if shape == like.shape else whole
    return recipes, wanted


def _replicated(leaf: Any) -> jax.sharding.Sharding:
    sharding = sharding_of(leaf)
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


def _carried(
    step: epath.Path,
    recorded: Manifest,
    opt_state: Any,
    recipes: Sequence[Recipe],
    source: state_tree.Flat,
    params: state_tree.Flat,
) -> Any:
    """Returns the optimiser's state with the checkpoint's moments, transformed."""
    ours = state_tree.flatten({"opt_state": opt_state})
    trees = {
        match[1]: match[2]
        for name in ours
        if (match := re.fullmatch(rf"(.*/({'|'.join(_POWERS)}))/.+", name))
    }
    unmatched = [
        name
        for name, leaf in ours.items()
        if leaf.ndim and not any(name.startswith(f"{tree}/") for tree in trees)
    ]
    if not trees or unmatched or any(recipe.moments is None for recipe in recipes):
        raise ValueError(
            f"INITIAL_MOMENTS = 'carry': {unmatched[0] if unmatched else 'the state'} of this optimiser has no "
            "image under the transform; use 'reset'."
        )
    theirs = {tree: _moments(recorded, kind, step) for tree, kind in trees.items()}
    wanted, counts = {}, {}
    for tree in trees:
        for name, leaf in source.items():
            stored = f"{theirs[tree]}/{name}"
            wanted[stored] = as_saved(recorded, stored, leaf)
        count, stored = (f"{x.rpartition('/')[0]}/count" for x in (tree, theirs[tree]))
        if count in ours and stored in recorded.arrays:
            counts[count] = stored
            wanted[stored] = as_saved(recorded, stored, ours[count])
    arrays = read_verified(step, recorded, wanted)
    new = {**ours, **{count: arrays[stored] for count, stored in counts.items()}}
    for tree, kind in trees.items():
        for recipe in recipes:
            assert recipe.moments is not None
            parts = [arrays[f"{theirs[tree]}/{name}"] for _, name in recipe.inputs]
            values = [params[name] for name in recipe.outputs]
            moments = recipe.moments(parts, values, _POWERS[kind])
            for name, value in zip(recipe.outputs, moments, strict=True):
                leaf = ours[f"{tree}/{name}"]
                new[f"{tree}/{name}"] = jax.device_put(value.astype(leaf.dtype), leaf.sharding)
    return state_tree.unflatten(new, {"opt_state": opt_state})["opt_state"]


def _moments(recorded: Manifest, kind: str, step: epath.Path) -> str:
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
