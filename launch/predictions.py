"""Predictions of a frozen model for the rows of a stream, computed before training and stored.

The kinds are the modules `reference` of preference tuning and `teacher` of distillation.
"""

import abc
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.bars import Bar
from espalier.common.ranges import AxisSize, Size
from espalier.data.cache import cache_dir
from espalier.data.cache import store as cache
from espalier.data.stream.predictions import PredictionStore, StoredStream
from espalier.launch.load.load_run import LoadedRun, RunConfig
from espalier.trainers import partitioning
from espalier.trainers.checkpoints import agreement
from espalier.trainers.objectives.frozen_model import FrozenModel, FrozenStep

_VERSION = 1  # increase it when the same model and tokens give other values


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StoredValues(abc.ABC):
    """Predictions that are computed before training, of one frozen model or of several.

    Attributes:
      store: directory of stored values; None for the default in the cache directory.
    """

    store: str | os.PathLike | None = None

    @abc.abstractmethod
    def read(self, stream: Any, *, steps: int | None) -> StoredStream:
        """Returns a stream with the predictions for `steps` steps (None: all), after computing the missing ones.

        Raises:
          ValueError: not the model of the run's first start, or a model that does not match the data.
          PredictionStoreError: the store is damaged.
          DamagedCheckpointError, FileNotFoundError: the checkpoint is damaged or missing.
        """

    @abc.abstractmethod
    def check(self, meta: Mapping[str, Any] | None = None) -> None:
        """Checks the models against facts of the data, before the data are tokenised; raises ValueError."""

    def training(
        self, stream: Callable[..., Any], steps: int | None, positions: Mapping[str, Any] | None
    ) -> Any:
        """Returns the training stream with predictions; `stream` opens it at `positions`, if there are any."""
        self.check()  # before data are tokenised
        opened = stream() if positions is None else stream(positions=positions)
        return self.read(opened, steps=steps)

    def held_out(self, stream: Callable[..., Any], task: str, steps: int | None) -> Any:
        """Returns the held-out stream of a task with predictions, for `steps` steps or the whole split."""
        opened = stream(task=task)
        return self.read(opened, steps=None if steps is None else min(steps, opened.num_steps))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StoredPredictions(StoredValues):
    """A frozen model whose predictions are computed before training.

    Attributes:
      batch_size: sequences at a time.
      mesh, rules: mesh and partitioning rules of this model.
    """

    batch_size: Size = 8
    mesh: Mapping[str, AxisSize] | None = None
    rules: str = "fsdp_tp"

    @property
    @abc.abstractmethod
    def frozen(self) -> FrozenModel:
        """The model with its checkpoint."""

    def check(self, meta: Mapping[str, Any] | None = None) -> None:
        """Checks the checkpoint against facts of the data, see `FrozenModel.check`; raises ValueError."""
        mesh, rules = partitioning.make_mesh(shape=self.mesh), partitioning.rules_named(self.rules)
        self.frozen.check(mesh, rules, meta or {})

    def _opened(
        self,
        step: FrozenStep,
        folder: str,
        about: Mapping[str, Any],
        *settings: Any,
        shape: tuple[int, ...],
    ) -> PredictionStore:
        """Returns the store of a step's values of a shape, which also depend on `settings`."""
        model, macro = self.frozen.model, self.frozen.checkpoint.macro
        config = dataclasses.asdict(model.config)
        # Older stores know the modules of classes without the package's name.
        text = repr(model).replace("espalier.", "")
        key = cache.digest([_VERSION, step.arrays, text, config, *settings])
        root = cache_dir.cache_dir(folder) if self.store is None else self.store
        about = {"checkpoint": step.step, **about}
        return PredictionStore.shared(key, about, root=root, shape=shape, setting=macro)

    def _add(
        self,
        store: PredictionStore,
        step: FrozenStep,
        missing: Iterator[tuple[str, Any]],
        values_of: Callable[[LoadedRun], Callable[[Sequence[Any]], np.ndarray]],
        *,
        at_once: int,
        encoder_decoders: bool = False,
        **bar_settings: Any,
    ) -> None:
        """Adds the values of (digest, input) to the store, `at_once` per write; loads the model if there are any."""
        if (first := next(missing, None)) is None:
            return
        missing = itertools.chain([first], missing)
        frozen = {"model": self.frozen.model, "mesh": self.mesh, "rules": self.rules}
        loaded = RunConfig(vocabulary=lambda: None, **frozen).load(
            step.step,
            params="ema" if self.frozen.checkpoint.use_ema else "raw",
            of_base=True,
            encoder_decoders=encoder_decoders,
        )
        with loaded as run, Bar(**bar_settings) as bar:
            values = values_of(run)
            while rows := dict(itertools.islice(missing, at_once)):
                store.add(list(rows), values(list(rows.values())))
                bar.update(len(rows))


def missing_anywhere(store: PredictionStore, digests: Sequence[str]) -> list[str]:
    """Returns the digests missing in the store of any process, in their order, the same in all processes.

    A process sees only its own disk, but all processes compute the missing values together.
    """
    lacking = set(store.missing(digests))
    masks = agreement.gather(np.packbits([digest in lacking for digest in digests]).tobytes().hex())
    anywhere = np.bitwise_or.reduce([np.frombuffer(bytes.fromhex(m), np.uint8) for m in masks])
    chosen = np.unpackbits(anywhere)[: len(digests)]
    return [digest for digest, missing in zip(digests, chosen, strict=True) if missing]
