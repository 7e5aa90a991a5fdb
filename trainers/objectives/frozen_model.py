"""A second model of a run that is not trained: a reference or a teacher, restored from a checkpoint."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from etils import epath
from jax.sharding import Mesh

from espalier.common.storage import paths
from espalier.model.adapters import adapter
from espalier.model.axes import Rules
from espalier.trainers import initialise
from espalier.trainers.checkpoints import agreement, base_step, restore_params, state_tree, step_dir
from espalier.trainers.checkpoints.manifest import ArrayEntry, DamagedCheckpointError
from espalier.trainers.objectives.base import Batch, StoredExtras
from espalier.trainers.objectives.forward import Forward, frozen_forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenStep:
    """The step of another run's checkpoint that this run uses.

    Attributes:
      step: path of the step directory.
      arrays: digest of the parameters.
      meta: recorded facts that must agree with this run: vocabulary, start_token, add_bos.
    """

    step: str
    arrays: str
    meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenCheckpoint:
    """Another run's checkpoint, of which this run uses the same step at every start.

    The other run may write newer checkpoints between two starts of this run. This run therefore records the resolved
    step in its directory, in reference.json for the macro REFERENCE.

    Attributes:
      macro: gin macro of the checkpoint, such as 'REFERENCE', for messages; <macro>_MODEL is its model.
      path: step or run directory.
      model_dir: directory of this run.
      use_ema: whether to restore the moving average of the parameters.
    """

    macro: str
    path: str | None
    model_dir: str
    use_ema: bool = False

    def __post_init__(self):
        if self.path is None:
            raise ValueError(
                f"{self.macro} is None: name the step or run directory of the model that this run compares with, often "
                "the one it starts from (INITIAL_CHECKPOINT_PATH)."
            )

    def resolve(self, *, record: bool = True) -> FrozenStep:
        """Returns the step recorded at this run's first start; at the first start, the newest undamaged step.

        With `record`, the step is written to this run's directory if it is not recorded yet.

        Raises:
          ValueError: this run began with another checkpoint or with other parameters in it, or there is no moving average.
          DamagedCheckpointError, FileNotFoundError: the checkpoint is damaged or missing.
        """
        assert self.path is not None  # see __post_init__
        name = self.macro.lower()
        fields = self.recorded(self.model_dir)
        wanted = {name: paths.absolute(self.path), "use_ema": self.use_ema}
        if fields is not None:
            began = {key: fields.pop(key) for key in wanted}
            if began[name] == os.path.abspath(self.path):
                began[name] = wanted[name]  # as older runs recorded addresses
            if began != wanted:
                raise ValueError(
                    f"{self.macro} = {self.path} (use_ema {self.use_ema}), but this run began with "
                    f"{began[name]} (use_ema {began['use_ema']}): give that checkpoint, or start in another MODEL_DIR."
                )
            if base_step.digest(self.arrays(fields["step"])) != fields["arrays"]:
                raise ValueError(
                    f"{self.macro}: {fields['step']} has other parameters than when this run began: put them back, or start in "
                    "another MODEL_DIR."
                )
            return FrozenStep(**fields)
        step = step_dir.newest_good(self.path, self._read)
        if record and agreement.is_primary():
            file = self._file(self.model_dir)
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {**wanted, **dataclasses.asdict(step)}
            step_dir.write_file(file, json.dumps(content, indent=1).encode())
        return step

    def recorded(self, run: str | os.PathLike) -> dict[str, Any] | None:
        """Returns what `resolve` recorded in the directory of a run, as process 0 reads it; None if it did not."""
        file = self._file(run)
        text = agreement.gather(file.read_text() if file.exists() else None)[0]
        return None if text is None else json.loads(text)

    def _file(self, run: str | os.PathLike) -> epath.Path:
        return step_dir.absolute(run) / f"{self.macro.lower()}.json"

    def arrays(self, step: Any) -> dict[str, ArrayEntry]:
        """Returns the manifest's entries of a step's parameters, by path."""
        path = step_dir.absolute(step)
        which = "ema" if self.use_ema else "raw"
        arrays = base_step.entries(path, step_dir.read_manifest(path), which)
        if not arrays:
            raise ValueError(
                f"{self.macro}: {step} holds no moving average; bind FrozenCheckpoint.use_ema = False."
            )
        return arrays

    def check(
        self,
        step: FrozenStep,
        meta: Mapping[str, Any],
        add_bos: str = "set PROMPT_BOS",
        *,
        encodes: bool,
    ) -> None:
        """Raises ValueError if the checkpoint has another vocabulary, start token or BOS than this run's data in `meta`.

        Facts that are absent are not compared. `add_bos` is the setting of BOS, for the message; `encodes` is as in
        `step_dir.begins_otherwise`.
        """
        digest = meta.get("vocabulary")
        theirs = step.meta.get("vocabulary", digest)
        if digest is not None and theirs != digest:
            raise ValueError(
                f"{self.macro}: {step.step} was trained with another vocabulary (digest {theirs[:12]}) than this run's "
                f"data ({digest[:12]}): use the vocabulary of that checkpoint, or name another {self.macro}."
            )
        for key, setting in (("start_token", "set DOCUMENT_START"), ("add_bos", add_bos)):
            theirs = step.meta.get(key, meta.get(key))
            if key in meta and step_dir.begins_otherwise(key, theirs, meta[key], encodes=encodes):
                raise ValueError(
                    f"{self.macro}: documents of {step.step} begin with {key} = {theirs}, but this run's with "
                    f"{meta[key]}: {setting} = {theirs}."
                )

    def _read(self, step: Any) -> FrozenStep:
        meta = step_dir.read_record(step)["meta"]
        return FrozenStep(
            step=os.fspath(step),
            arrays=base_step.digest(self.arrays(step)),
            meta={k: meta[k] for k in ("vocabulary", "start_token", "add_bos") if k in meta},
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FrozenModel(StoredExtras):
    """A model that is not trained, such as a reference or a teacher: the `StoredExtras` of an objective.

    Attributes:
      model: the module, whose parameters the checkpoint has.
      checkpoint: where its parameters are read from, once, before the first step.
    """

    model: Any
    checkpoint: FrozenCheckpoint
    add_bos: ClassVar[str] = "set PROMPT_BOS"  # see FrozenCheckpoint.check

    def abstract(self, mesh: Mesh, rules: Rules) -> Any:
        """Returns shapes, dtypes and shardings of the parameters.

        Those of a base model, which the checkpoint of a reference mostly is, have none of adapters.
        """
        params = initialise.abstract_params(self.model, mesh, rules)
        if not (facts := adapter.record(self.model)):
            return params
        saved: Mapping[str, Any] = {}
        # A step is also compiled where the checkpoint is absent.
        with contextlib.suppress(FileNotFoundError, DamagedCheckpointError):
            saved = self.checkpoint.arrays(self.checkpoint.resolve(record=False).step)
        return base_step.present(params, saved, base_step.added(facts))

    def check(self, mesh: Mesh, rules: Rules, meta: Mapping[str, Any]) -> None:
        """Checks the checkpoint without reading its arrays or writing anything; see `StoredExtras.check`.

        Raises:
          ValueError: no undamaged checkpoint, or a checkpoint of another model or of other data, see `FrozenCheckpoint.check`.
        """
        macro = self.checkpoint.macro
        try:
            step = self.checkpoint.resolve(record=False)
            saved = self.checkpoint.arrays(step.step)
        except (DamagedCheckpointError, FileNotFoundError) as error:
            raise ValueError(
                f"{macro} = {self.checkpoint.path} cannot be read: {error} Name a step directory, or a run directory "
                "with checkpoints."
            ) from None
        wanted = state_tree.flatten(self.abstract(mesh, rules))
        differences = [
            f"{name}: the checkpoint has {saved.get(name, 'none')}, the model "
            f"{restore_params.describe(wanted[name]) if name in wanted else 'none'}"
            for name in sorted({*saved, *wanted})
            if name not in saved or name not in wanted or saved[name].shape != wanted[name].shape
        ]
        if differences:
            raise ValueError(
                f"{macro}: {step.step} is of another model: {restore_params.list_differences(differences)}. Set "
                f"{macro}_MODEL to the model of that run; run_model.model reads it from the run's model.json "
                "(docs/extend/add_a_method.md)."
            )
        self.checkpoint.check(step, meta, self.add_bos, encodes=self.model.row.encodes)

    def read(self, mesh: Mesh, rules: Rules) -> Any:
        """Returns the parameters; raises the errors of `FrozenCheckpoint.resolve` and `restore_params`."""
        return restore_params.restore_params(
            self.checkpoint.resolve().step,
            self.abstract(mesh, rules),
            use_ema=self.checkpoint.use_ema,
        )

    def forward(self, params: Any, batch: Batch, policy: Any = None) -> Forward:
        """Returns a forward pass on a batch, with no gradient to the parameters; the policy's are not used."""
        del policy
        return frozen_forward(self.model, params, batch)
