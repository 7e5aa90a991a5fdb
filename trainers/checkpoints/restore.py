"""Restores whole states onto any mesh, verified, in one order for every entry point.

`restore_or_initialise` looks for the state of a run in

  1. the latest good step of its own run directory;
  2. INITIAL_CHECKPOINT_PATH (see initial.py), the latest good step if it is a run;
  3. a fresh initialisation.

Nothing is unpickled: checkpoints are JSON and raw arrays.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from trainers.checkpoints import phase_state, state_tree, step_dir
from trainers.checkpoints.array_files import read_verified
from trainers.checkpoints.initial import NEW_PARAMETERS, InitialCheckpoint
from trainers.checkpoints.restore_params import (
    CheckpointMismatchError,
    describe,
    kept_variables,
    list_differences,
    restore_params,
)
from trainers.checkpoints.transformed import transformed


class RunMismatchError(ValueError):
    """A checkpoint was written by a run with another configuration."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state and where it came from.

    Attributes:
      step: the number of steps taken.
      state: of the structure of the abstract state.
      meta: the run's facts recorded with it.
      metrics: the metrics recorded with it.
      path: its step directory; None for a fresh state.
      source: 'run', 'initial' or 'scratch'.
      skipped: newer damaged steps, each with the reason.
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
      expected_meta: keys that must have these values in the recorded meta.

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
    initial: InitialCheckpoint = NEW_PARAMETERS,
    restart: Callable[[Any], Any] | None = None,
) -> Restored:
    """Returns the state a run starts from: of its own checkpoint, the initial one, or a fresh one.

    Args:
      checkpointer: the `Checkpointer` of the run.
      abstract_state: the TrainState as jax.ShapeDtypeStruct with shardings.
      initialise: makes a fresh TrainState with these shardings.
      expected_meta: see `restore_state`; concerns the run's own checkpoints only.
      initial: what to start from if the run has no checkpoint yet.
      restart: gives a state a fresh optimiser for its parameters, which a checkpoint's have replaced; None where the
        fresh optimiser of `initialise` fits any parameters.

    Raises:
      ValueError: options of `initial` that exclude each other.
      DamagedCheckpointError, CheckpointMismatchError, RunMismatchError, FileNotFoundError.
    """
    initial.check()
    restored = checkpointer.restore_latest(abstract_state, expected_meta=expected_meta)
    if restored is not None:
        return restored
    if not initial.path:
        return Restored(step=0, state=initialise(), source="scratch")
    if initial.transform is not None or initial.scope == "params":
        return _restore_variables(initial, initialise(), restart)
    restored = restore_state(initial.path, abstract_state)
    if initial.scope == "phase":
        state = phase_state.at_step_0(restored.state)
        restored = dataclasses.replace(restored, step=0, state=state)
    return dataclasses.replace(restored, source="initial")


def _restore_variables(
    initial: InitialCheckpoint, state: Any, restart: Callable[[Any], Any] | None
) -> Restored:
    """Returns a fresh state with the checkpoint's parameters, possibly transformed, and collections.

    With a transform and the scope 'state', the step and the place in schedules are the checkpoint's. A
    moving average begins with the new parameters.
    """
    transform = initial.transform

    def read(step: epath.Path) -> Restored:
        recorded = step_dir.read_manifest(step)
        record = step_dir.read_record(step, recorded)
        if transform is not None:
            made = transformed(step, recorded, state, transform, initial)
        else:
            restored = restore_params(
                step,
                state.params,
                assignment=initial.assignment,
                strict=initial.strict,
                use_ema=initial.use_ema,
            )
            made = state.replace(params=restored)
        made = made.replace(variables=kept_variables(step, state.variables))
        if state.ema_params is not None:
            # Averages have their own dtype, and a buffer is donated once only.
            ema = jax.tree.map(
                lambda p, e: jnp.array(p, e.dtype, copy=True), made.params, state.ema_params
            )
            made = made.replace(ema_params=ema)
        if restart is not None and initial.moments == "reset":
            made = restart(made)
        first = record["step"] if initial.scope == "state" else 0
        return Restored(
            step=first,
            state=phase_state.at_step(made, first) if first else made,
            meta=record["meta"],
            path=step,
            source="initial",
        )

    assert initial.path is not None
    return step_dir.newest_good(initial.path, read)
