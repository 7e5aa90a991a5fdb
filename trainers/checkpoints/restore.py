"""Reading whole states back onto any mesh, verified, in one order for every entry point.

`restore_or_initialise` looks for the state of a run in

  1. the latest good step of its own run directory;
  2. INITIAL_CHECKPOINT_PATH (its parameters, also its moments, or all of its state), the latest good step
     if it is a run;
  3. a fresh initialisation.

Nothing here unpickles anything: checkpoints are JSON and raw arrays.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from etils import epath

from model.transforms.base import TreeTransform
from trainers.checkpoints import phase_state, state_tree, step_dir
from trainers.checkpoints.array_files import read_verified
from trainers.checkpoints.restore_params import (
    Assignment,
    CheckpointMismatchError,
    describe,
    kept_variables,
    list_differences,
    restore_params,
)
from trainers.checkpoints.restore_transformed import Moments, restore_transformed

Scope = Literal["params", "phase", "state"]
SCOPES = get_args(Scope)


class RunMismatchError(ValueError):
    """A checkpoint was written by a run with another configuration."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state and where it came from.

    Attributes:
      step: the number of steps taken.
      state: as the abstract state that was asked for.
      meta: what the run recorded with it.
      metrics: the metrics recorded with it.
      path: its step directory; None for a fresh state.
      source: 'run', 'initial' or 'scratch'.
      skipped: newer steps that were damaged, each with the reason.
    """

    step: int
    state: Any
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    path: epath.Path | None = None
    source: str = "run"
    skipped: Sequence[tuple[int, str]] = ()


def _check_meta(path: epath.Path, meta: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    def leaves(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {name: value}
        pairs = [leaves(child, f"{name}.{key}" if name else key) for key, child in value.items()]
        return {key: leaf for pair in pairs for key, leaf in pair.items()}

    there = leaves({key: meta.get(key) for key in expected}, "")
    here = leaves(json.loads(json.dumps(dict(expected))), "")
    differences = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise RunMismatchError(
            f"checkpoint {path} belongs to another run: {list_differences(differences)}. Use a new "
            "MODEL_DIR (INITIAL_CHECKPOINT_PATH starts it from these parameters), or the "
            "configuration the run was started with."
        )


def _check_same_arrays(path: epath.Path, saved: Mapping[str, Any], wanted: state_tree.Flat) -> None:
    differences = []
    for name in sorted({*saved, *wanted}):
        there = str(saved[name]) if name in saved else "no such array"
        here = describe(wanted[name]) if name in wanted else "no such array"
        if there != here:
            differences.append(f"{name}: the checkpoint has {there}, the model {here}")
    if differences:
        raise CheckpointMismatchError(
            f"checkpoint {path} is of another model or optimiser: {list_differences(differences)}. "
            "Use the configuration it was saved with, or start from its parameters alone with "
            "INITIAL_CHECKPOINT_PATH and INITIAL_SCOPE = 'params'."
        )


def restore_state(
    path: str | os.PathLike,
    abstract_state: Any,
    *,
    expected_meta: Mapping[str, Any] | None = None,
) -> Restored:
    """Restores all of a state onto the shardings of `abstract_state`, verified.

    Args:
      path: a step directory, or a run directory for its newest good step.
      abstract_state: a pytree of jax.ShapeDtypeStruct with shardings, or of arrays.
      expected_meta: keys that must have these values in what was recorded.

    Raises:
      DamagedCheckpointError, CheckpointMismatchError, RunMismatchError, FileNotFoundError.
    """

    def read(step: epath.Path) -> Restored:
        return _restore(step, abstract_state, expected_meta or {})

    return step_dir.newest_good(path, read)


def _restore(path: epath.Path, abstract_state: Any, expected_meta: Mapping[str, Any]) -> Restored:
    recorded = step_dir.read_manifest(path)
    record = step_dir.read_record(path, recorded)
    _check_meta(path, record["meta"], expected_meta)
    wanted = state_tree.flatten(abstract_state)
    _check_same_arrays(path, recorded.arrays, wanted)
    arrays = read_verified(path, recorded, wanted)
    return Restored(
        step=record["step"],
        state=state_tree.unflatten(arrays, abstract_state),
        meta=record["meta"],
        metrics=record["metrics"],
        path=path,
    )


def restore_or_initialise(
    checkpointer: Any,
    abstract_state: Any,
    initialise: Callable[[], Any],
    *,
    expected_meta: Mapping[str, Any] | None = None,
    initial_checkpoint_path: str | os.PathLike | None = None,
    initial_scope: Scope = "params",
    assignment: Assignment = (),
    strict: bool = True,
    use_ema: bool = False,
    transform: TreeTransform | None = None,
    moments: Moments = "reset",
    restart: Callable[[Any], Any] | None = None,
) -> Restored:
    """The state a run starts from, in the documented order: own run, initial checkpoint, scratch.

    Args:
      checkpointer: the `Checkpointer` of the run.
      abstract_state: the TrainState as jax.ShapeDtypeStruct with shardings.
      initialise: makes a fresh TrainState with these shardings.
      expected_meta: see `restore_state`; concerns the run's own checkpoints only.
      initial_checkpoint_path: where to start from if the run has no checkpoint yet: a step directory,
        or a run directory for its newest good step.
      initial_scope: 'params' takes the model's variables (step 0, fresh optimiser); 'phase' also averages
        and the optimiser's moments, at step 0 of a new schedule; 'state' takes everything, the step
        and the place in the schedule too.
      assignment, strict, use_ema: see `restore_params`; for the scope 'params' alone.
      transform: what makes the initial checkpoint's parameters into those of this model.
      moments: with `transform`, see `restore_transformed`.
      restart: gives a state a fresh optimiser for its parameters, which a checkpoint's have replaced; None where the
        fresh optimiser of `initialise` fits any parameters.

    Raises:
      ValueError: an unknown scope, or options that it does not have.
      DamagedCheckpointError, CheckpointMismatchError, RunMismatchError, FileNotFoundError.
    """
    if initial_scope not in SCOPES:
        raise ValueError(f"initial_scope = {initial_scope!r}: use {', '.join(map(repr, SCOPES))}.")
    options = {
        "initial_assignment": bool(assignment),
        "initial_strict = False": not strict,
        "initial_use_ema": use_ema,
    }
    if initial_scope != "params" and any(options.values()):
        raise ValueError(
            f"initial_scope = {initial_scope!r} takes a state as it was saved, so that "
            f"{', '.join(name for name, given in options.items() if given)} would have no effect: "
            "leave out what is named, or use initial_scope = 'params'."
        )
    if transform is not None and not initial_checkpoint_path:
        raise ValueError(
            "INITIAL_TRANSFORM changes the parameters of a checkpoint: set INITIAL_CHECKPOINT_PATH."
        )
    if moments == "carry" and (transform is None or initial_scope == "params"):
        raise ValueError(
            "INITIAL_MOMENTS = 'carry' needs an INITIAL_TRANSFORM, and INITIAL_SCOPE = 'phase' or "
            "'state': the scope 'params' takes no moments."
        )
    restored = checkpointer.restore_latest(abstract_state, expected_meta=expected_meta)
    if restored is not None:
        return restored
    if transform is not None:
        given = {"assignment": assignment, "strict": strict, "use_ema": use_ema}
        state, path = restore_transformed(
            initial_checkpoint_path, initialise(), transform, moments=moments, **given
        )
        if restart is not None and moments == "reset":
            state = restart(state)
        if initial_scope != "state":
            state = phase_state.at_step_0(state)
        step = int(state.step)
        return Restored(
            step=step, state=state, meta=step_dir.read_meta(path), path=path, source="initial"
        )
    if initial_checkpoint_path and initial_scope != "params":
        restored = restore_state(initial_checkpoint_path, abstract_state)
        if initial_scope == "phase":
            restored = dataclasses.replace(
                restored, step=0, state=phase_state.at_step_0(restored.state)
            )
        return dataclasses.replace(restored, source="initial")
    state = initialise()
    if not initial_checkpoint_path:
        return Restored(step=0, state=state, source="scratch")

    def read(step: epath.Path) -> Restored:
        params = restore_params(
            step, state.params, assignment=assignment, strict=strict, use_ema=use_ema
        )
        ema = state.ema_params
        if ema is not None:
            # Averages have their own dtype, and a buffer is donated once only.
            ema = jax.tree.map(lambda p, e: jnp.array(p, e.dtype, copy=True), params, ema)
        return Restored(
            step=0,
            state=state.replace(
                params=params,
                ema_params=ema,
                variables=kept_variables(step, state.variables),
            ),
            meta=step_dir.read_meta(step),
            path=step,
            source="initial",
        )

    restored = step_dir.newest_good(initial_checkpoint_path, read)
    if restart is not None:
        restored = dataclasses.replace(restored, state=restart(restored.state))
    return restored
