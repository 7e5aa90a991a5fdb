"""Streams of packed tokens with a teacher's top-k log-probabilities, which are computed before training.

Example: `train.train.stream = @teacher.make_stream`. Storing pays off if several runs, or several epochs, learn from
the same teacher and rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from espalier.common.ranges import CalledWith, Positive, Size
from espalier.data.distillation import taught_stream
from espalier.data.distillation.taught_stream import TaughtStream
from espalier.data.stream.predictions import PredictionStore
from espalier.launch import predictions
from espalier.launch.load.load_run import LoadedRun
from espalier.model.kernels.cross_entropy import map_tokens
from espalier.trainers.distillation import objective
from espalier.trainers.distillation.objective import Teacher
from espalier.trainers.objectives.forward import frozen_forward

_ROWS_AT_ONCE = 256  # per write to the store


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StoredTeacher(predictions.StoredPredictions):
    """A teacher whose predictions are computed before training.

    Attributes:
      teacher: the model and its checkpoint.
      student: the model in training; ids outside of its embedding table are not stored.
      top_k: tokens stored per position.
      temperature: temperature of the stored log-probabilities; must be the objective's.
    """

    teacher: Teacher
    student: Any
    top_k: Size
    temperature: Positive = 1.0

    @property
    def frozen(self) -> Teacher:
        return self.teacher

    @property
    def _shared(self) -> int:
        """Number of ids that both embedding tables have."""
        return min(self.teacher.model.config.vocab_size, self.student.config.vocab_size)

    def read(self, stream: Any, *, steps: int | None) -> TaughtStream:
        """Returns a stream of packed tokens with the teacher's predictions; see `StoredPredictions.read`."""
        if not 1 <= self.top_k <= self._shared:
            raise ValueError(
                f"TEACHER_TOP_K = {self.top_k} must lie in [1, {self._shared}], the vocabulary."
            )
        data = stream.summary()
        vocabulary = data["vocabulary"]["digest"]
        objective.check_student(self.teacher, self.student)
        self.check({"vocabulary": vocabulary, "start_token": data["start_token"]})
        step = self.teacher.checkpoint.resolve()
        store = self._opened(
            step,
            taught_stream.FOLDER,
            {"top_k": self.top_k, "temperature": self.temperature},
            [self.top_k, self.temperature, self._shared, stream.targets_length],
            shape=taught_stream.shape_of(stream.targets_length, self.top_k),
        )
        missing = missing_rows(stream, store, stream.num_steps if steps is None else steps)
        bar: dict[str, Any] = {"desc": "teacher", "unit": "row"}
        options: dict[str, Any] = {"at_once": _ROWS_AT_ONCE, "encoder_decoders": True}
        self._add(store, step, missing, self._values_of, **options, **bar)
        return TaughtStream(stream, store, top_k=self.top_k, teacher=step.arrays)

    def _values_of(self, run: LoadedRun) -> Callable[[Sequence[Any]], np.ndarray]:
        size = run.batch_size(self.batch_size, self.batch_size)
        over = run.row_sharding
        whole = None if over is None else NamedSharding(over.mesh, PartitionSpec())
        predict = jax.jit(functools.partial(self._predictions, run.model), out_shardings=whole)

        def values(rows: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
            columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            parts = [_padded(columns, at, size) for at in range(0, len(rows), size)]
            predicted = [predict(run.params, jax.device_put(part, over)) for part in parts]
            return np.concatenate(predicted)[: len(rows)]

        return values

    def _predictions(self, model: Any, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        return predictions_of(
            model,
            params,
            batch,
            ids=self._shared,
            top_k=self.top_k,
            temperature=self.temperature,
        )


def predictions_of(
    model: Any,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    ids: int,
    top_k: int,
    temperature: float,
) -> jax.Array:
    """Returns the values to store of a model among its first `ids` ids, [B, T, 2 K + 1], see `taught_stream.shape_of`."""
    out = frozen_forward(model, params, batch)
    form, head_VD = objective.form_of(model), out.head_VD()

    def of_chunk(h_CD):
        logits_CV = form.logits(h_CD, head_VD.astype(h_CD.dtype))[:, :ids]
        return objective.largest(logits_CV, top_k, temperature)

    ids_XK, log_probs_XN = map_tokens(of_chunk, out.hidden_XD, vocab=head_VD.shape[0])
    shape = batch["decoder_input_tokens"].shape
    values_XN = jnp.concatenate([ids_XK.astype(jnp.float32), log_probs_XN], axis=-1)
    return values_XN.reshape(*shape, -1)


def missing_rows(
    stream: Any, store: PredictionStore, steps: int
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (digest, columns) of rows missing in any process's store, each once, in the same order in all processes."""
    seen: set[str] = set()
    for step in range(steps):
        batch = stream.batch(step, 0, stream.batch_size)
        digests = taught_stream.row_digests(batch)
        place_of = {digest: b for b, digest in enumerate(digests)}
        for digest in predictions.missing_anywhere(store, digests):
            if digest not in seen:
                seen.add(digest)
                row = place_of[digest]
                yield digest, {name: batch[name][row] for name in taught_stream.read_columns(batch)}


def _padded(columns: Mapping[str, np.ndarray], first: int, size: int) -> dict[str, np.ndarray]:
    """Returns rows [first, first + size), padded with zeros after the last row."""
    parts = {name: column[first : first + size] for name, column in columns.items()}
    return {name: np.pad(x, ((0, size - len(x)), (0, 0))) for name, x in parts.items()}


def make_stream(
    *,
    teacher: predictions.StoredValues,
    stream: Annotated[Callable[..., Any], CalledWith("positions")],
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
            "A stored teacher is computed for TRAIN_STEPS: set it in place of TRAIN_TOKENS or TRAIN_EPOCHS."
        )
    return teacher.training(stream, steps, positions)


def make_eval_stream(
    *,
    task: str,
    teacher: predictions.StoredValues,
    stream: Annotated[Callable[..., Any], CalledWith("task")],
    steps: Size | None = None,
) -> TaughtStream:
    """Returns the held-out stream of a task with the teacher's predictions, for `steps` steps or the whole split."""
    return teacher.held_out(stream, task, steps)
