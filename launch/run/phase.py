"""The start of a run: the parent run that it continues, and its restored state.

Each of the run's own checkpoints records the facts that it took from its parent (`initial`), so that the run resumes in
the same way after the parent has been deleted.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from espalier.launch.run import run_dir, run_vocabulary
from espalier.model.adapters import adapter
from espalier.trainers.checkpoints import base_step, restore, step_dir
from espalier.trainers.checkpoints.initial import Data, InitialCheckpoint, Scope
from espalier.trainers.checkpoints.manifest import DamagedCheckpointError
from espalier.trainers.checkpoints.restore_params import INFERENCE_PART
from espalier.trainers.recipe import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
    """The facts that a run takes from its parent run, besides the state.

    Attributes:
      path: step directory of the parent; None for a run that begins with new parameters.
      scope, data: see `InitialCheckpoint`.
      step: the step at which this run begins.
      learning_rate: learning rate of the parent's next update; None if the parent did not record it.
      positions: the parent's position in each source (see TrainStream.positions); empty for the beginnings.
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
    """Returns the parent recorded in this run's own checkpoints, or else the parent in `initial`.

    Raises:
      ValueError: the checkpoint does not record its run's position in the data.
      FileNotFoundError, DamagedCheckpointError: the initial checkpoint is missing or damaged.
    """
    try:
        return step_dir.newest_good(checkpoints, _recorded_parent)
    except (FileNotFoundError, DamagedCheckpointError):
        pass  # A damaged checkpoint is reported when the state is restored.
    if not initial.path:
        return Parent()
    path, record = step_dir.newest_good(initial.path, lambda p: (p, step_dir.read_record(p)))
    meta = record["meta"]
    if initial.data == "continue" and "positions" not in meta:
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH: {path} does not record its run's position in the data, so "
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


def check_vocabulary(checkpoints: str | os.PathLike, parent: Parent, digest: str | None) -> None:
    """Checks the vocabulary of a run's data, before they are tokenised.

    Args:
      checkpoints: the run's own.
      parent: result of `find_parent`.
      digest: of the vocabulary; None if the data have none, or several.

    Raises:
      ValueError: the run's own checkpoints, or without these its parent's, were trained with another vocabulary.
    """
    for macro, path in (("MODEL_DIR", checkpoints), ("INITIAL_CHECKPOINT_PATH", parent.path)):
        try:
            theirs = None if path is None else run_vocabulary.trained_digest(path)
        except FileNotFoundError:
            continue
        _check_digest(macro, path, theirs, digest)
        return


def _check_digest(macro: str, path: Any, theirs: str | None, ours: str | None) -> None:
    """Raises ValueError if both digests are known and differ: another vocabulary would train silently on wrong ids.

    `path` is of a step, or of all checkpoints of a run.
    """
    if theirs is None or ours is None or theirs == ours:
        return
    run = step_dir.folder_of(epath.Path(path))
    if macro == "MODEL_DIR":
        remedy = (
            f"the files that it is made from have changed. Put them back, {run_dir.train_on(run)}."
        )
    elif (run / run_vocabulary.RECORD).exists():
        remedy = (
            f"take that of its run, --gin.TOKENIZER='\"{run}\"' with a data file that reads TOKENIZER, such as "
            "data/hf_files.gin in place of data/files.gin."
        )
    else:
        remedy = "use the vocabulary the checkpoint was trained with."
    raise ValueError(
        f"{macro}: {path} was trained with another vocabulary (digest {theirs[:12]}) than this run's data has "
        f"({ours[:12]}): {remedy}"
    )


def _recorded_parent(step: epath.Path) -> Parent:
    """Returns the parent in the record of a run's own step; raises DamagedCheckpointError."""
    record = step_dir.read_record(step)["meta"].get("initial", {})
    try:
        return Parent(**record)
    except TypeError:
        problem = f"has meta.initial with {', '.join(record)} in the place of a parent's facts"
        raise DamagedCheckpointError(step, {step_dir.META: problem}) from None


def restore_start(
    checkpointer: Any,
    program: Program,
    initial: InitialCheckpoint,
    parent: Parent,
    identity: Mapping[str, Any],
) -> tuple[restore.Restored, dict[str, Any]]:
    """Returns the state that a run starts from, and the facts to record with each of its checkpoints.

    Args:
      checkpointer: checkpointer of the run.
      program: makes the state.
      initial: the start of a run without checkpoints of its own.
      parent: result of `find_parent`.
      identity: facts that the run's own checkpoints must agree on (`RunData.identity`).

    Raises:
      ValueError: a parent with another vocabulary or other beginnings of documents, or damaged in a way
        that changes the phase.
      DamagedCheckpointError, CheckpointMismatchError, RunMismatchError, FileNotFoundError, BaseModelError.
    """
    start = restore.restore_or_initialise(
        checkpointer,
        program.abstract_state,
        program.init,
        expected_meta=identity,
        initial=initial,
        restart=program.restart,
        extensions=program.recipe.step_extensions,
    )
    check_prompts(program, start, identity)
    if start.source == "initial":
        _check_digest(
            "INITIAL_CHECKPOINT_PATH",
            start.path,
            start.meta.get("vocabulary"),
            identity.get("vocabulary"),
        )
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
    if initial.base_apart:
        meta[base_step.META] = _base(program, start, initial)
    if part := getattr(program.recipe.model, "inference_part", ""):
        meta[INFERENCE_PART] = part
    adapter.check_settings(program.recipe.model, start.meta.get("adapters"), start.path)
    return start, meta | adapter.record(program.recipe.model)


def _base(
    program: Program, start: restore.Restored, initial: InitialCheckpoint
) -> Mapping[str, str]:
    """Returns what this run's checkpoints say of the base model that they are without."""
    if start.source == "run":
        return start.meta[base_step.META]  # a run does not change its configuration
    assert start.path is not None  # see InitialCheckpoint.check
    if start.state.ema_params is not None:
        raise ValueError(
            "BASE_APART is without effect on moving averages, which have the base model too: remove Recipe.ema_decay "
            "or Recipe.averaged, or set BASE_APART = False."
        )
    return base_step.frozen(
        start.path,
        program.abstract_state.params,
        program.mask,
        base_step.added(adapter.record(program.recipe.model)),
        use_ema=initial.use_ema,
    )


def _at_restored_step(parent: Parent, start: restore.Restored) -> Parent:
    """Returns the parent with the path of the restored step, which may be older than the newest."""
    if str(start.path) == parent.path:
        return parent
    moved = parent.step != start.step
    if parent.scope == "phase" or parent.data == "continue" or moved:
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH: {parent.path} is damaged, and {start.path} is at another place "
            "of its data and schedule: give the directory of the step to start from."
        )
    return dataclasses.replace(parent, path=str(start.path))


def check_prompts(program: Program, start: restore.Restored, identity: Mapping[str, Any]) -> None:
    """Raises ValueError unless prompts begin (BOS, start token) like the documents of the parent's training."""
    if program.recipe.inputs_spec.loss_per != "pairs" or start.source != "initial":
        return
    for key, macro in (("start_token", "DOCUMENT_START"), ("add_bos", "PROMPT_BOS")):
        theirs = start.meta.get(key, identity[key])
        if theirs != identity[key]:
            raise ValueError(
                f"INITIAL_CHECKPOINT_PATH: documents of {start.path} begin otherwise ({key} {theirs}) than this "
                f"run's prompts ({identity[key]}): set {macro} = {theirs}."
            )
