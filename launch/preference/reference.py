"""Streams of preference pairs with the log-probabilities of a reference model, which are computed before training.

Example: `train.train.stream = @reference.make_stream`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from espalier.common.ranges import CalledWith, Size
from espalier.data import tasks
from espalier.data.preference.stream import ReferencedStream
from espalier.data.stream.predictions import PredictionStore
from espalier.launch import predictions
from espalier.launch.load.load_run import LoadedRun
from espalier.model.rows import TOKENS, RowKind
from espalier.trainers.objectives.frozen_model import FrozenCheckpoint, FrozenModel
from espalier.trainers.scoring.scoring import Row, Scorer

_FOLDER = "reference_log_probs"
_PAIRS_AT_ONCE = 4096  # per write to the store


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reference(predictions.StoredPredictions):
    """The reference model of a policy.

    Attributes:
      model: the linen module.
      checkpoint: the checkpoint of its parameters.
    """

    model: Any
    checkpoint: FrozenCheckpoint

    @property
    def frozen(self) -> FrozenModel:
        return FrozenModel(model=self.model, checkpoint=self.checkpoint)

    def read(self, stream: Any, *, steps: int | None = None) -> ReferencedStream:
        """Returns a stream of pairs with the reference's values; see `StoredPredictions.read`."""
        step = self.checkpoint.resolve()
        summary = stream.summary()
        vocabulary, start = summary["vocabulary"]["digest"], summary["start_token"]
        bos = tasks.add_bos(stream.source_names)
        meta = {"vocabulary": vocabulary, "start_token": start, "add_bos": bos}
        self.checkpoint.check(step, meta, encodes=self.model.row.encodes)
        store = self._opened(step, _FOLDER, {"vocabulary": vocabulary}, shape=(2,))
        wanted, pairs = _wanted(stream, store, steps), stream.pairs()

        def values_of(run: LoadedRun) -> Callable[[Sequence[Any]], np.ndarray]:
            size = run.batch_size(self.batch_size, 2 * len(wanted))
            scorer = Scorer(run.model, run.params, batch_size=size, sharding=run.row_sharding)
            kind = self.model.row
            before = [] if start is None else [start]
            return lambda digests: _values(scorer, before, map(pairs.ids, digests), kind)

        # The ids are read from the disk when they are needed.
        missing = zip(wanted, wanted, strict=True)
        bar = {"total": len(wanted), "desc": "reference", "unit": "pair"}
        self._add(
            store, step, missing, values_of, at_once=_PAIRS_AT_ONCE, encoder_decoders=True, **bar
        )
        return ReferencedStream(stream, store, step.arrays)


def _values(
    scorer: Callable[[Sequence[Row]], Sequence[np.ndarray]],
    before: Sequence[int],
    pairs: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    kind: RowKind = TOKENS,
) -> np.ndarray:
    """Returns log-probabilities of both completions of each (prompt, chosen, rejected), float32 [N, 2].

    A completion in several pairs, such as the best of many answers, is scored once.
    """
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    place_of_each = [
        places.setdefault((tuple(prompt.tolist()), tuple(completion.tolist())), len(places))
        for prompt, *completions in pairs
        for completion in completions
    ]
    rows = [Row(targets=targets, **kind.placed(before, prompt)) for prompt, targets in places]
    sums = [np.sum(log_probs, dtype=np.float64) for log_probs in scorer(rows)]
    return np.array(sums, np.float32)[place_of_each].reshape(-1, 2)


def _wanted(stream: Any, store: PredictionStore, steps: int | None) -> list[str]:
    """Returns the digests of the pairs that `steps` steps read (None: all) and that lack a value."""
    digests = list(stream.pairs().digests)
    if steps is not None and steps * stream.batch_size < len(digests):
        rows = (stream.row_ids(step, 0, stream.batch_size) for step in range(steps))
        digests = list(dict.fromkeys(d for batch in rows for row in batch for d in row if d))
    return predictions.missing_anywhere(store, digests)


def make_stream(
    *,
    reference: Reference,
    stream: Annotated[Callable[..., Any], CalledWith("positions")],
    steps: Size | None = None,
    positions: Mapping[str, Any] | None = None,
) -> ReferencedStream:
    """Returns the training stream of pairs with reference values.

    Args:
      reference: the reference model.
      stream: opens the pairs; called with (positions=) to continue where another run stopped.
      steps: steps of the run.
      positions: see data/stream/stream.py.
    """
    return reference.training(stream, steps, positions)


def make_eval_stream(
    *,
    task: str,
    reference: Reference,
    stream: Annotated[Callable[..., Any], CalledWith("task")],
    steps: Size | None = None,
) -> ReferencedStream:
    """Returns the held-out stream of a task with reference values, for `steps` steps or the whole split."""
    return reference.held_out(stream, task, steps)
