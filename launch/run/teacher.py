"""Streams of packed tokens with a teacher's top-k log-probabilities, which are computed before training.

Example: `train.train.stream = @teacher.make_stream`. Storing pays off if several runs, or several epochs, learn from
the same teacher and rows.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from espalier.common.bars import Bar
from espalier.common.ranges import AxisSize, Positive, Size
from espalier.data.cache import cache_dir
from espalier.data.cache import store as cache
from espalier.data.distillation import taught_stream
from espalier.data.distillation.taught_stream import TaughtStream
from espalier.data.preference.reference_store import ReferenceStore
from espalier.launch.run.load_run import load_frozen
from espalier.model.kernels.cross_entropy import map_tokens
from espalier.trainers import partitioning
from espalier.trainers.checkpoints import agreement
from espalier.trainers.distillation import objective
from espalier.trainers.distillation.objective import Teacher
from espalier.trainers.objectives.forward import frozen_forward

_VERSION = 1  # increase it when the same model and tokens give other values
_ROWS_AT_ONCE = 256  # rows per write to the store


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StoredTeacher:
    """A teacher whose predictions are computed before training.

    Attributes:
      teacher: the model and its checkpoint.
      student: the model in training; ids outside of its embedding table are not stored.
      top_k: tokens stored per position.
      temperature: temperature of the stored log-probabilities; must be the objective's.
      batch_size: rows at a time.
      mesh, rules: mesh and partitioning rules of the teacher.
      store: directory of stored values; None for the default in the cache directory.
    """

    teacher: Teacher
    student: Any
    top_k: Size
    temperature: Positive = 1.0
    batch_size: Size = 8
    mesh: Mapping[str, AxisSize] | None = None
    rules: str = "fsdp_tp"
    store: str | os.PathLike | None = None

    @property
    def _shared(self) -> int:
        """Number of ids that both embedding tables have."""
        return min(self.teacher.model.config.vocab_size, self.student.config.vocab_size)

    def check(self, meta: Mapping[str, Any]) -> None:
        """Checks the teacher against facts of the data, see `Teacher.check`; raises ValueError."""
        mesh, rules = partitioning.make_mesh(shape=self.mesh), partitioning.rules_named(self.rules)
        self.teacher.check(mesh, rules, meta)

    def read(self, stream: Any, *, steps: int) -> TaughtStream:
        """Returns a stream of packed tokens with the teacher's predictions, after computing the missing ones.

        Args:
          stream: stream of packed tokens.
          steps: number of steps to read.

        Raises:
          ValueError: not the teacher of the run's first start, or a teacher that does not match the data.
          ReferenceStoreError: the store is damaged.
          DamagedCheckpointError, FileNotFoundError: the checkpoint is damaged or missing.
        """
        if not 1 <= self.top_k <= self._shared:
            raise ValueError(
                f"TEACHER_TOP_K = {self.top_k} must lie in [1, {self._shared}], the vocabulary."
            )
        data = stream.summary()
        vocabulary = data["vocabulary"]["digest"]
        self.check({"vocabulary": vocabulary, "start_token": data["start_token"]})
        frozen = self.teacher.checkpoint.resolve()
        settings = [self.top_k, self.temperature, self._shared, stream.length]
        config = dataclasses.asdict(self.teacher.model.config)
        model = cache.digest([_VERSION, frozen.arrays, repr(self.teacher.model), config, settings])
        root = cache_dir.cache_dir(taught_stream.FOLDER) if self.store is None else self.store
        store = ReferenceStore.shared(
            model,
            {"checkpoint": frozen.step, "top_k": self.top_k, "temperature": self.temperature},
            root=root,
            shape=taught_stream.shape_of(stream.length, self.top_k),
            setting=self.teacher.checkpoint.macro,
        )
        self._compute(stream, store, steps, frozen.step)
        return TaughtStream(stream, store, top_k=self.top_k, teacher=frozen.arrays)

    def _compute(self, stream: Any, store: ReferenceStore, steps: int, checkpoint: str) -> None:
        """Adds the teacher's predictions for the rows of these steps to the store."""
        missing = _missing(stream, store, steps)
        first = next(missing, None)
        if first is None:
            return
        model, frozen = self.teacher.model, self.teacher.checkpoint
        with (
            load_frozen(model, checkpoint, frozen, self.mesh, self.rules) as run,
            Bar(desc="teacher", unit="row") as bar,
        ):
            size = run.batch_size(self.batch_size, self.batch_size)
            rows_over = run.row_sharding
            whole = None if rows_over is None else NamedSharding(rows_over.mesh, PartitionSpec())
            predict = jax.jit(functools.partial(self._predictions, run.model), out_shardings=whole)
            missing = itertools.chain([first], missing)
            while rows := dict(itertools.islice(missing, _ROWS_AT_ONCE)):
                columns = {
                    name: np.stack([row[name] for row in rows.values()])
                    for name in taught_stream.READ
                }
                parts = [_padded(columns, at, size) for at in range(0, len(rows), size)]
                values = [predict(run.params, jax.device_put(part, rows_over)) for part in parts]
                store.add(list(rows), np.concatenate(values)[: len(rows)])
                bar.update(len(rows))

    def _predictions(self, model: Any, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the values to store, [B, T, 2 K + 1]."""
        out = frozen_forward(model, params, batch)
        form, head_VD = objective.form_of(model), out.head_VD()

        def of_chunk(h_CD):
            logits_CV = form.logits(h_CD, head_VD.astype(h_CD.dtype))[:, : self._shared]
            return objective.largest(logits_CV, self.top_k, self.temperature)

        ids_XK, log_probs_XN = map_tokens(of_chunk, out.hidden_XD, vocab=head_VD.shape[0])
        shape = batch["decoder_input_tokens"].shape
        values_XN = jnp.concatenate([ids_XK.astype(jnp.float32), log_probs_XN], axis=-1)
        return values_XN.reshape(*shape, -1)


def _missing(
    stream: Any, store: ReferenceStore, steps: int
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (digest, columns) of rows missing in any process's store, each once, in the same order in all processes."""
    seen: set[str] = set()
    for step in range(steps):
        batch = stream.batch(step, 0, stream.batch_size)
        digests = taught_stream.row_digests(batch)
        mine = [digest for digest in store.missing(digests) if digest not in seen]
        anywhere = {digest for process in agreement.gather(mine) for digest in process}
        for b, digest in enumerate(digests):
            if digest in anywhere and digest not in seen:
                seen.add(digest)
                yield digest, {name: batch[name][b] for name in taught_stream.READ}


def _padded(columns: Mapping[str, np.ndarray], first: int, size: int) -> dict[str, np.ndarray]:
    """Returns rows [first, first + size), padded with zeros after the last row."""
    parts = {name: column[first : first + size] for name, column in columns.items()}
    return {name: np.pad(x, ((0, size - len(x)), (0, 0))) for name, x in parts.items()}


def make_stream(
    *,
    teacher: StoredTeacher,
    stream: Callable[..., Any],
    steps: Size | None,
    positions: Mapping[str, Any] | None = None,
) -> TaughtStream:
    """Returns the training stream of tokens with the teacher's predictions.

    Args:
      teacher: the teacher.
      stream: opens the tokens; called with (positions=) to continue where another run stopped.
      steps: steps of the run; ValueError if it is None.
      positions: see data/stream/stream.py.
    """
    if steps is None:
        raise ValueError(
            "A stored teacher is computed for TRAIN_STEPS: set it in place of TRAIN_TOKENS."
        )
    teacher.check({})  # before data are tokenised
    opened = stream() if positions is None else stream(positions=positions)
    return teacher.read(opened, steps=steps)


def make_eval_stream(
    *, task: str, teacher: StoredTeacher, stream: Callable[..., Any], steps: Size | None = None
) -> TaughtStream:
    """Returns the held-out stream of a task with the teacher's predictions, for `steps` steps or the whole split."""
    opened = stream(task=task)
    return teacher.read(opened, steps=min(opened.num_steps, steps or opened.num_steps))
