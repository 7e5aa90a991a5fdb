"""Where a run that goes on from another begins: in its data, and at which learning rate.

What a run was told of the one before it is recorded with each of its own checkpoints (`initial`), so that it
goes on in the same way when that one is no longer there.
"""

import os
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from trainers.checkpoints import restore, step_dir
from trainers.checkpoints.manifest import DamagedCheckpointError

Data = Literal["restart", "continue"]


def initial(
    checkpoints: str | os.PathLike,
    initial_checkpoint_path: str | os.PathLike | None,
    *,
    scope: restore.Scope,
    data: Data,
) -> dict[str, Any]:
    """What is taken from the run before; nothing for a run that begins with new parameters.

    Args:
      checkpoints: of this run; what they say holds, if there are any.
      initial_checkpoint_path: a step directory, or a run directory for its newest good step.
      scope: see `trainers.checkpoints.restore.restore_or_initialise`.
      data: 'continue' reads every source on from where it stopped, 'restart' from its beginning.

    Returns:
      'path', 'scope', 'data', 'step' (at which this run begins), 'learning_rate' (at which the other would
      have made its next update, None if it does not say), 'positions' (see data.stream.train_stream.Stream.positions; empty with 'restart').

    Raises:
      ValueError: options that do not go together, or a checkpoint that does not say how far it read.
    """
    if not initial_checkpoint_path and (scope == "phase" or data == "continue"):
        raise ValueError(
            f"initial_scope = {scope!r} and initial_data = {data!r} go on from another run: set "
            "INITIAL_CHECKPOINT_PATH to its directory."
        )
    if data == "continue" and scope == "state":
        raise ValueError(
            "initial_scope = 'state' goes on at the next batch of the same stream as it is: leave "
            "initial_data = 'continue' out, or use initial_scope = 'phase' for another mixture."
        )
    if (own := _recorded(checkpoints)) is not None:
        return own
    if not initial_checkpoint_path:
        return {}
    path, record = step_dir.newest_good(initial_checkpoint_path, _read)
    meta = record["meta"]
    if data == "continue" and "positions" not in meta:
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH: {path} does not say how far its run read its data, so that "
            "initial_data = 'continue' is not possible: use 'restart'."
        )
    return {
        "path": str(path),
        "scope": scope,
        "data": data,
        "step": record["step"] if scope == "state" else 0,
        "learning_rate": meta.get("learning_rate"),
        "positions": meta["positions"] if data == "continue" else {},
    }


def begun(start: restore.Restored, told: Mapping[str, Any]) -> dict[str, Any]:
    """What to record of a run's beginning, once its state is there.

    Raises:
      ValueError: the state is of an older step than the place that the phase goes on from.
    """
    if start.source != "initial" or str(start.path) == told["path"]:
        return dict(told)
    elsewhere = told.get("step", start.step) != start.step
    if told["scope"] == "phase" or told["data"] == "continue" or elsewhere:
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH: {told['path']} is damaged, and {start.path} would stand in for it "
            "at another place of its data and schedule: name the step to start from."
        )
    return {**told, "path": str(start.path)}


def _read(path: epath.Path) -> tuple[epath.Path, dict[str, Any]]:
    return path, step_dir.read_record(path, step_dir.read_manifest(path))


def _recorded(checkpoints: str | os.PathLike) -> dict[str, Any] | None:
    """What this run's own checkpoints say; None if there are none."""
    try:
        return step_dir.newest_good(checkpoints, _read)[1]["meta"].get("initial", {})
    except (FileNotFoundError, DamagedCheckpointError):
        return None
