"""A run that starts from a merge of other runs, computed in memory: t5x_configs/methods/averaging/merge.gin.

The run has the same parameters, bit for bit, as one that starts from the output of `espalier merge` with the same configuration,
because the same code makes each array.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.bars import Bar
from espalier.launch.merge import checks, config_file, native_output, output, settings
from espalier.launch.merge.models import Model, NativeModel, open_model
from espalier.launch.merge.output import Workers
from espalier.launch.merge.plan import Planner
from espalier.launch.merge.settings import MergeError
from espalier.trainers.checkpoints.manifest import ArrayEntry

Configuration = str | Mapping[str, Any]


def first_model(*, merge: Configuration) -> str:
    """Returns the path of the model whose vocabulary and facts a merge has; raises MergeError."""
    return config_file.one(merge).models()[0]


@dataclasses.dataclass(frozen=True)
class Merge:
    """Opens the merge that a run starts from, as `InitialCheckpoint.computed`.

    Attributes:
      merge: a YAML file as for `espalier merge`, or its content as a dict.
      seed: of methods that draw random numbers; None for 0.
    """

    merge: Configuration
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.merge, Mapping):
            # A mistake is reported before any run of a sweep is trained.
            config_file.one(self.merge)

    def __call__(self) -> "Merged":
        merge = config_file.one(self.merge)
        if self.seed is not None and not merge.is_random:
            raise MergeError(
                f"MERGE_SEED = {self.seed} has no effect: {merge.method} draws nothing. Remove it."
            )
        return Merged(merge, opened(merge), seed=self.seed or 0)


def opened(merge: settings.Merge) -> dict[str, NativeModel]:
    """Returns the models of a merge by path; raises MergeError unless they are runs of one architecture."""
    models: dict[str, Model] = {path: open_model(path) for path in merge.models()}
    runs = {path: model for path, model in models.items() if isinstance(model, NativeModel)}
    if others := [path for path in models if path not in runs]:
        raise MergeError(
            f"{merge.file}: {others[0]} is a Hugging Face folder, where runs are needed: import it with espalier convert --from_hf."
        )
    checks.check(merge, models)
    return runs


class Merged:
    """A merge of runs, as a trainers.checkpoints.restore_params.ComputedCheckpoint.

    Args:
      merge: the configuration.
      models: those of the merge, by path.
      seed: of random methods.
      workers: threads that merge blocks; None for new ones.

    Attributes:
      steps, meta, entries: see ComputedCheckpoint.

    Raises:
      MergeError, TransformError: as `espalier merge`.
    """

    def __init__(
        self,
        merge: settings.Merge,
        models: Mapping[str, NativeModel],
        *,
        seed: int = 0,
        workers: Workers | None = None,
    ):
        self._workers = workers or Workers()
        self._planner = Planner(merge, models, seed=seed)
        self._planned = self._planner.plan()
        self._workers.check_equal(self._planned, models, merge.file)
        checks.warn(merge, models, [x.name for x in self._planned])
        donor = models[merge.models()[0]]
        fields = native_output.changed_fields(self._planner, self._planned)
        config = dataclasses.replace(donor.model.config, **fields)
        self._parts = native_output.by_array(config, self._planned)
        self.steps: Sequence[Any] = [models[path].source.step for path in merge.models()]
        record = output.record(self._planner)
        facts = native_output.facts_of(record, self._planner, changed=bool(fields))
        self.meta: Mapping[str, Any] = facts
        self.entries: Mapping[str, ArrayEntry] = {path: self._entry(path) for path in self._parts}

    def _entry(self, path: str) -> ArrayEntry:
        array = self._streamed(path, None)
        return ArrayEntry(array.shape, array.dtype.name, 0)

    def _streamed(self, path: str, bar: Any) -> Any:
        return native_output.streamed(self._parts[path], self._planner, self._workers, bar)

    def read(self, name: str) -> np.ndarray:
        """Returns the merged values of an array."""
        with Bar(desc=f"merging {name}", unit="B", unit_scale=True, leave=False, delay=5) as bar:
            array = self._streamed(name, bar)
            values = np.empty(array.shape, array.dtype)
            for start, block in array.blocks():
                where = tuple(slice(a, a + b) for a, b in zip(start, block.shape, strict=True))
                values[where] = block
        return values

    def table(self) -> list[str]:
        """Returns lines of a table of the tensors, as `espalier merge --dry_run` prints it."""
        return output.table(self._planned)
