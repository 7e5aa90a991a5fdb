"""What a run takes of the run that it starts from: weights, schedule, place in the data, and how prompts begin.

Each of the run's own checkpoints records the facts that it took from its parent (`initial`), so that the run resumes in
the same way after the parent has been deleted.
"""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from espalier.launch.config import gin_source
from espalier.launch.run import run_dir
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.initial import Data, InitialCheckpoint, Scope
from espalier.trainers.checkpoints.manifest import DamagedCheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
    """The facts that a run takes from its parent run, besides the state.

    Attributes:
      path: step directory of the parent; None for a run that begins with new parameters.
      scope, data: see `InitialCheckpoint`.
      step: the step at which this run begins.
      skipped: steps before it whose updates were dropped, which schedules do not count.
      learning_rate: learning rate of the parent's next update; None if the parent did not record it.
      positions: the parent's position in each source (see TrainStream.positions); empty for the beginnings.
    """

    path: str | None = None
    scope: Scope = "params"
    data: Data = "restart"
    step: int = 0
    learning_rate: float | None = None
    positions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    skipped: int = 0

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
        skipped=meta.get("skipped", 0) if initial.scope == "state" else 0,
        # What is computed from several checkpoints has no rate at which it stopped.
        learning_rate=None
        if initial.computed and initial.scope == "params"
        else meta.get("learning_rate"),
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
            theirs = None if path is None else trained_digest(path)
        except FileNotFoundError:
            continue
        check_digest(macro, path, theirs, digest)
        return


def check_digest(macro: str, path: Any, theirs: str | None, ours: str | None) -> None:
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
    elif (run / gin_source.VOCABULARY_RECORD).exists():
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


def trained_digest(checkpoint: str | os.PathLike) -> str | None:
    """Returns the digest of the vocabulary that a checkpoint was trained with; None if it does not record one.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    for step in step_dir.candidates(checkpoint):
        # A damaged step is reported when it is restored.
        with contextlib.suppress(DamagedCheckpointError):
            return step_dir.read_meta(step).get("vocabulary")
    return None


def start_token(
    *, model_dir: str | os.PathLike | None = None, checkpoint: str | os.PathLike | None = None
) -> int | None:
    """Returns the id before the first token of a document; None for no id, as with most imported models.

    Args:
      model_dir: directory of this run.
      checkpoint: run or step directory of the model that this run starts from. A model without a record has 0.
    """
    return _recorded_meta(model_dir, checkpoint).get("start_token", 0)


def add_bos(
    *, model_dir: str | os.PathLike | None = None, checkpoint: str | os.PathLike | None = None
) -> bool:
    """Returns whether texts of a run, or of the checkpoint it starts from, begin with BOS; False for a model without a record."""
    return bool(_recorded_meta(model_dir, checkpoint).get("add_bos", False))


def _recorded_meta(*checkpoints: str | os.PathLike | None) -> Mapping[str, Any]:
    for path in checkpoints:
        # What is missing or damaged is reported when the state is restored.
        try:
            if path is not None:
                return step_dir.newest_good(path, step_dir.read_record)["meta"]
        except (FileNotFoundError, DamagedCheckpointError):
            pass
    return {}
