"""Where a run starts from: the parent it continues, and its restored state.

What a run takes from its parent is recorded with each of its own checkpoints (`initial`), so that it
continues in the same way once the parent has been deleted.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from trainers.checkpoints import restore, step_dir
from trainers.checkpoints.initial import Data, InitialCheckpoint, Scope
from trainers.checkpoints.manifest import DamagedCheckpointError
from trainers.recipe import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
    """What a run takes from the run before it, apart from the state.

    Attributes:
      path: step directory of the parent; None for a run that begins with new parameters.
      scope, data: see `InitialCheckpoint`.
      step: the step at which this run begins.
      learning_rate: of the parent's next update; None if the parent did not record it.
      positions: how far the parent had read each source (see TrainStream.positions); empty to read
        from the beginnings.
    """

    path: str | None = None
    scope: Scope = "params"
    data: Data = "restart"
    step: int = 0
    learning_rate: float | None = None
    positions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Returns the JSON form in run.json and checkpoints; empty without a parent."""
        return {} if self.path is None else dataclasses.asdict(self)


def find_parent(checkpoints: str | os.PathLike, initial: InitialCheckpoint) -> Parent:
    """Returns the parent that this run's own checkpoints record, or else that of `initial`.

    Raises:
      ValueError: a checkpoint that does not record how far its run read the data.
      FileNotFoundError, DamagedCheckpointError: of the initial checkpoint.
    """
    try:
        own = step_dir.newest_good(checkpoints, _read_record)[1]["meta"]
        return Parent(**own.get("initial", {}))
    except (FileNotFoundError, DamagedCheckpointError):
        pass  # A damaged checkpoint is reported when the state is restored.
    if not initial.path:
        return Parent()
    path, record = step_dir.newest_good(initial.path, _read_record)
    meta = record["meta"]
    if initial.data == "continue" and "positions" not in meta:
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH: {path} does not say how far its run read its data, so that "
            "INITIAL_DATA = 'continue' is not possible: use 'restart'."
        )
    return Parent(
        path=str(path),
        scope=initial.scope,
        data=initial.data,
        step=record["step"] if initial.scope == "state" else 0,
        learning_rate=meta.get("learning_rate"),
        positions=meta["positions"] if initial.data == "continue" else {},
    )


def _read_record(path: epath.Path) -> tuple[epath.Path, dict[str, Any]]:
    return path, step_dir.read_record(path, step_dir.read_manifest(path))


def restore_start(
    checkpointer: Any,
    program: Program,
    initial: InitialCheckpoint,
    parent: Parent,
    identity: Mapping[str, Any],
) -> tuple[restore.Restored, dict[str, Any]]:
    """Restores or initialises the state of a run.

    Args:
      checkpointer: of the run.
      program: makes the state.
      initial: what to start from while there is no own checkpoint.
      parent: of `find_parent`.
      identity: what the run's own checkpoints must agree on (`RunData.identity`).

    Returns:
      The state, and the facts to record with every checkpoint of the run.

    Raises:
      ValueError: a parent with another vocabulary, or damaged in a way that changes the phase.
      DamagedCheckpointError, CheckpointMismatchError, RunMismatchError, FileNotFoundError.
    """
    start = restore.restore_or_initialise(
        checkpointer,
        program.abstract_state,
        program.init,
        expected_meta=identity,
        initial=initial,
        restart=program.restart,
    )
    check_prompts(program, start, identity)
    if start.source == "initial":
        _check_vocabulary(start, identity)
        parent = _at_restored_step(parent, start)
    meta = dict(identity)
    # Export after training needs the files of an imported model; extension needs a mixture's sources.
    hf = start.meta.get("hf", {})
    if hf := {key: hf[key] for key in ("family", "config", "generation_config") if key in hf}:
        meta["hf"] = hf
    if "upcycled" in start.meta:
        meta["upcycled"] = start.meta["upcycled"]
    if record := parent.record():
        meta["initial"] = record
    return start, meta


def _at_restored_step(parent: Parent, start: restore.Restored) -> Parent:
    """Returns the parent with the path of the step that was restored, which may be an older one."""
    if str(start.path) == parent.path:
        return parent
    moved = parent.step != start.step
    if parent.scope == "phase" or parent.data == "continue" or moved:
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH: {parent.path} is damaged, and {start.path} is at another place "
            "of its data and schedule: name the step to start from."
        )
    return dataclasses.replace(parent, path=str(start.path))


def _check_vocabulary(start: restore.Restored, identity: Mapping[str, Any]) -> None:
    """Checks the vocabulary: another one would train silently on wrong ids."""
    if "vocabulary" not in identity:  # not a language model
        return
    ours, theirs = identity["vocabulary"], start.meta.get("vocabulary", identity["vocabulary"])
    if theirs != ours:
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH: {start.path} was trained with another vocabulary (digest "
            f"{theirs[:12]}) than this run's data has ({ours[:12]}): use the vocabulary "
            "the checkpoint was trained with."
        )


def check_prompts(program: Program, start: restore.Restored, identity: Mapping[str, Any]) -> None:
    """Checks that prompts begin as the documents did on which the parent was trained.

    Raises:
      ValueError: they begin otherwise, so that the model would never have seen such a beginning.
    """
    if program.recipe.inputs_spec.loss_per != "pairs" or start.source != "initial":
        return
    for key, macro in (("start_token", "DOCUMENT_START"), ("add_bos", "PROMPT_BOS")):
        theirs = start.meta.get(key, identity[key])
        if theirs != identity[key]:
            raise ValueError(
                f"INITIAL_CHECKPOINT_PATH: documents of {start.path} begin otherwise ({key} {theirs}) than this "
                f"run's prompts ({identity[key]}): set {macro} = {theirs}."
            )
