"""Restores whole states onto any mesh, verified. Nothing is unpickled: checkpoints are JSON and raw arrays."""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from espalier.trainers.anomaly import GATHERED, STATISTICS
from espalier.trainers.checkpoints import base_step, state_tree, step_dir
from espalier.trainers.checkpoints.array_files import read_verified, sharding_of
from espalier.trainers.checkpoints.initial import NEW_PARAMETERS, InitialCheckpoint, transformed
from espalier.trainers.checkpoints.manifest import DamagedCheckpointError, Manifest
from espalier.trainers.checkpoints.restore_params import (
    CheckpointMismatchError,
    ComputedCheckpoint,
    SavedArrays,
    as_saved,
    describe,
    list_differences,
    restore_params,
    restore_variables,
)
from espalier.trainers.extensions import StepExtension, of_model

_log = logging.getLogger(__name__)
# The dtypes of the arrays themselves are compared: a run may store others than its model's config has (optim/rounding.py).
_OF_ARRAYS = "model.param_dtype"


class RunMismatchError(ValueError):
    """A checkpoint was written by a run with another configuration."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state and its origin.

    Attributes:
      step: the number of steps taken.
      state: the state, with the structure of the abstract state.
      meta, metrics: the run's facts and the metrics recorded with the state.
      path: step directory of the state; None for a fresh state.
      source: 'run', 'initial' or 'scratch'.
      skipped: newer damaged steps, each with the reason; also the same step of another tier.
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
        for name in sorted({*there, *here} - {_OF_ARRAYS})
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
        narrow = any(
            saved[name].dtype in ("bfloat16", "float16") and saved[name].dtype != wanted[name].dtype
            for name in saved.keys() & wanted.keys()
        )
        layout = SavedArrays(saved, {name: tuple(x.shape) for name, x in wanted.items()})
        found = (layout.find(name, tuple(x.shape)) for name, x in wanted.items())
        remedy = ""
        if narrow:
            remedy = " It was trained in a narrower dtype, which loses small updates; Recipe.rounding = 'nearest' goes on so."
        if any(array is not None and array.moved for array in found):
            remedy += (
                " Its layers are scanned in other groups, or on one side only (layer_pattern, scan_layers): parameters are moved "
                "between these, an optimiser's state is not."
            )
        raise CheckpointMismatchError(
            f"checkpoint {path} is of another model or optimiser: {list_differences(differences)}. "
            "Use the configuration it was saved with, or start from its parameters with "
            f"INITIAL_CHECKPOINT_PATH and INITIAL_SCOPE = 'params'.{remedy}"
        )


def _unknown_losses(saved: dict[str, Any], wanted: state_tree.Flat) -> state_tree.Flat:
    """Takes the losses of the first window out of both if they differ; returns unknown ones where they are wanted.

    A run may change its `Anomaly` when it goes on, and checkpoints of earlier versions have no such losses.
    """
    name = f"variables/{STATISTICS}/{GATHERED}"
    there, here = saved.get(name), wanted.get(name)
    if there is not None and here is not None and str(there) == describe(here):
        return {}
    saved.pop(name, None)
    return {} if wanted.pop(name, None) is None else {name: _filled(here, np.nan)}


def restore_state(
    path: str | os.PathLike, abstract_state: Any, *, expected_meta: Mapping[str, Any] | None = None
) -> Restored:
    """Returns a whole state, restored onto the shardings of `abstract_state` and verified.

    Args:
      path: a step directory, or a run directory for its newest good step.
      abstract_state: a pytree of jax.ShapeDtypeStruct with shardings, or of arrays.
      expected_meta: keys that must have these values in the recorded meta.

    Raises:
      DamagedCheckpointError, CheckpointMismatchError, RunMismatchError, FileNotFoundError, BaseModelError.
    """

    read = functools.partial(
        read_step, abstract_state=abstract_state, expected_meta=expected_meta, read=read_verified
    )
    return step_dir.newest_good(path, read)


def read_step(
    step: epath.Path,
    abstract_state: Any,
    *,
    expected_meta: Mapping[str, Any] | None,
    read: Callable[[epath.Path, Manifest, state_tree.Flat], state_tree.Flat],
    run: epath.Path | None = None,
) -> Restored:
    """Returns the state of one step directory; `read` reads its arrays. Otherwise as `restore_state`.

    `run` is the directory of the step's run if the step is elsewhere.
    """
    recorded = step_dir.read_manifest(step)
    record = step_dir.read_record(step, recorded)
    _check_meta(step, record["meta"], expected_meta or {})
    wanted = state_tree.flatten(abstract_state)
    base = base_step.base_in(step, record["meta"], run)
    of_base = {} if base is None else {f"params/{name}": x for name, x in base.entries.items()}
    as_read = {
        name: base_step.widened(entry, wanted[name]) if name in wanted else entry
        for name, entry in of_base.items()
    }
    saved = {**recorded.arrays, **as_read}
    unknown = _unknown_losses(saved, wanted)
    _check_same_arrays(step, saved, wanted)
    own = {name: leaf for name, leaf in wanted.items() if name not in of_base}
    arrays = {**read(step, recorded, own), **unknown}
    if base is not None:
        arrays |= _read_base(step, base, {name: wanted[f"params/{name}"] for name in base.entries})
    return Restored(**record, state=state_tree.unflatten(arrays, abstract_state), path=step)


def _read_base(step: epath.Path, base: base_step.Part, wanted: state_tree.Flat) -> state_tree.Flat:
    """Returns the base's parameters by their path in a state."""
    there = {
        base.root + name: as_saved(base.recorded, base.root + name, leaf)
        for name, leaf in wanted.items()
    }
    try:
        arrays = read_verified(base.step, base.recorded, there)
    except DamagedCheckpointError as error:  # its adapters are good: they are not set aside
        raise base_step.BaseModelError(f"{step} is without its base model: {error}") from None
    return {
        f"params/{name}": arrays[base.root + name].astype(leaf.dtype)
        for name, leaf in wanted.items()
    }


def restore_or_initialise(
    checkpointer: Any,
    abstract_state: Any,
    initialise: Callable[[], Any],
    *,
    expected_meta: Mapping[str, Any] | None = None,
    initial: InitialCheckpoint = NEW_PARAMETERS,
    restart: Callable[[Any], Any] | None = None,
    extensions: Sequence[StepExtension] = (),
) -> Restored:
    """Returns the state that a run starts from.

    This is the latest good step of its own directory; or else of INITIAL_CHECKPOINT_PATH; or else a fresh state.

    Args:
      checkpointer: the run's `Checkpointer`.
      abstract_state: the TrainState as jax.ShapeDtypeStruct with shardings.
      initialise: returns a fresh TrainState with these shardings.
      expected_meta: see `restore_state`; applies only to the run's own checkpoints.
      initial: the checkpoint to start from if the run has none.
      restart: returns a state with a fresh optimiser for its parameters; None if a fresh optimiser does not
        depend on their values.
      extensions: those of the run, whose parts of the state begin again with another run's parameters.

    Raises:
      ValueError: options of `initial` exclude each other.
      DamagedCheckpointError, CheckpointMismatchError, RunMismatchError, FileNotFoundError.
    """
    initial.check()
    restored = checkpointer.restore_latest(abstract_state, expected_meta=expected_meta)
    if restored is not None:
        return restored
    if not initial.path:
        return Restored(step=0, state=initialise(), source="scratch")
    if initial.transform is not None or initial.scope == "params":
        return _restore_variables(initial, initialise(), restart, extensions)
    computed = _computed(initial)
    restored = restore_state(initial.path, abstract_state)
    if computed is not None:
        restored = _with_parameters(restored, computed, restart)
    if initial.scope == "phase":
        restored = dataclasses.replace(
            restored, step=0, state=_at_phase_start(restored.state, extensions)
        )
    return dataclasses.replace(restored, source="initial")


def _restore_variables(
    initial: InitialCheckpoint,
    state: Any,
    restart: Callable[[Any], Any] | None,
    extensions: Sequence[StepExtension],
) -> Restored:
    """Returns a fresh state with the checkpoint's collections and parameters, possibly transformed.

    With a transform and the scope 'state', the step and the counts of schedules are the checkpoint's. A
    moving average starts at the new parameters.
    """

    assert initial.path is not None
    computed = _computed(initial)

    def read(step: epath.Path) -> Restored:
        recorded = step_dir.read_manifest(step)
        record = step_dir.read_record(step, recorded)
        if initial.transform is not None:
            new = transformed(step, recorded, state, initial.transform, initial, computed)
        else:
            names = ("assignment", "strict", "use_ema", "added")
            options = {key: getattr(initial, key) for key in names}
            params = restore_params(step, state.params, **options, computed=computed)
            new = state.replace(params=params)
        if computed is None:
            new = new.with_parts(restore_variables(step, of_model(extensions, state.variables)))
        if state.ema_params is not None:
            # A copy, because averages have their own dtype, and a buffer can be donated only once.
            ema = jax.tree.map(
                lambda p, e: jnp.array(p, e.dtype, copy=True), new.params, state.ema_params
            )
            new = new.replace(ema_params=ema)
        if restart is not None and initial.moments == "reset":
            new = restart(new)
        first = record["step"] if initial.scope == "state" else 0
        new = _at_step(new, first, first - record["meta"].get("skipped", 0)) if first else new
        # Sums of the old model's metrics do not belong into a row of the new one.
        facts = record["meta"] if computed is None else computed.meta
        meta = {key: value for key, value in facts.items() if key != "window"}
        return Restored(step=first, state=new, meta=meta, path=step, source="initial")

    return step_dir.newest_good(initial.path, read)


def _with_parameters(
    restored: Restored,
    computed: ComputedCheckpoint,
    restart: Callable[[Any], Any] | None,
) -> Restored:
    """Returns a whole state with computed parameters, and their record among its facts.

    Raises:
      ValueError: the state has more of its own parameters than moments.
    """
    state, path = restored.state, restored.path
    assert path is not None
    if restart is not None or state.ema_params is not None:
        raise ValueError(
            "An optimiser or an average that has a copy of the parameters cannot go on with others: use INITIAL_SCOPE = 'params'."
        )
    state = state.replace(params=restore_params(path, state.params, computed=computed))
    meta = {**restored.meta, **computed.meta}
    return dataclasses.replace(restored, state=state, meta=meta)


def _computed(initial: InitialCheckpoint) -> ComputedCheckpoint | None:
    """Returns the opened checkpoint that is computed from several; None if the run starts from one that is stored."""
    if initial.computed is None:
        return None
    assert initial.path is not None
    computed = initial.computed()
    named = step_dir.folder_of(step_dir.resolve(initial.path))
    if named not in map(step_dir.folder_of, computed.steps):
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH = {os.fspath(initial.path)!r} is none of the checkpoints that {initial.computed!r} is "
            "computed from: remove it from the command, or name the one whose data, moments and step go on."
        )
    _log.info("initial parameters:\n%s", "\n".join(computed.table()))
    return computed


def _at_phase_start(state: Any, extensions: Sequence[StepExtension]) -> Any:
    """Returns the state with steps and schedules at 0.

    Moments and their counts for bias correction do not change. What extensions have of the data or of the objective's extras,
    such as statistics of losses, is reset, because a new phase has others.
    """
    names = [extension.name for extension in extensions if extension.of_data]
    return _at_step(state.with_parts({name: _filled(state.part(name), 0) for name in names}), 0, 0)


def _at_step(state: Any, step: int, updates: int) -> Any:
    """Returns the state with its step, and the counts of its schedules at `updates`; moments do not change."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def moved(node: Any) -> Any:
        return _filled(node, updates) if is_schedule(node) else node

    opt_state = jax.tree.map(moved, state.opt_state, is_leaf=is_schedule)
    return state.replace(step=_filled(state.step, step), opt_state=opt_state)


def _filled(tree: Any, value: float) -> Any:
    def fill(array: Any) -> jax.Array:
        whole = np.full(array.shape, value, array.dtype)
        # Unlike device_put, it does not compare the values of processes, where NaN would differ from itself.
        return jax.make_array_from_callback(array.shape, sharding_of(array), lambda i: whole[i])

    return jax.tree.map(fill, tree)
