"""The checkpoint that a new run starts from, and which parts of it the run uses."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal, get_args

from espalier.model.transforms.base import TreeTransform
from espalier.trainers.checkpoints.restore_params import Assignment

Scope = Literal["params", "phase", "state"]
Data = Literal["restart", "continue"]
Moments = Literal["reset", "carry"]


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
