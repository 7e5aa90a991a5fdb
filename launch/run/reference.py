"""Streams of preference pairs with the log-probabilities of a reference model, which are computed before training.

Example: `train.train.stream = @reference.make_stream`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.bars import Bar
from espalier.common.ranges import AxisSize, Size
from espalier.data import tasks
from espalier.data.cache import store as cache
from espalier.data.preference.reference_store import ReferencedStream, ReferenceStore
from espalier.launch.run.load_run import load_frozen
from espalier.model.rows import TOKENS, RowKind
from espalier.trainers import partitioning
from espalier.trainers.checkpoints import agreement
from espalier.trainers.objectives.frozen_model import FrozenCheckpoint, FrozenModel
from espalier.trainers.scoring.scoring import Row, Scorer

_VERSION = 1  # increase it when the same model and tokens give other values
_PAIRS_AT_ONCE = 4096  # pairs per write to the store


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reference:
    """The reference model of a policy.

    Attributes:
      model: the linen module.
      checkpoint: the checkpoint of its parameters.
      batch_size: sequences at a time.
      mesh, rules: mesh and partitioning rules of this model.
      store: directory of stored values; None for the default in the cache directory.
    """

    model: Any
    checkpoint: FrozenCheckpoint
    batch_size: Size = 8
    mesh: Mapping[str, AxisSize] | None = None
    rules: str = "fsdp_tp"
    store: str | os.PathLike | None = None

    def check(self) -> None:
        """Checks the checkpoint before data are opened, see `FrozenModel.check`; raises ValueError."""
        frozen = FrozenModel(model=self.model, checkpoint=self.checkpoint)
        mesh = partitioning.make_mesh(shape=self.mesh)
        frozen.check(mesh, partitioning.rules_named(self.rules), {})

    def read(self, stream: Any, *, steps: int | None = None) -> ReferencedStream:
        """Returns a stream of pairs with the reference's values, after computing the missing ones.

        Args:
          stream: stream of pairs.
          steps: number of steps to read; None for all pairs.

        Raises:
          ValueError: not the reference of the run's first start, or its vocabulary or the beginnings of its documents
            differ.
          ReferenceStoreError: the store is damaged.
          DamagedCheckpointError, FileNotFoundError: the checkpoint is damaged or missing.
        """
        frozen = self.checkpoint.resolve()
        summary = stream.summary()
        ours = summary["vocabulary"]["digest"]
        self.checkpoint.check_vocabulary(frozen, ours)
        meta = {
            "start_token": summary["start_token"],
            "add_bos": tasks.add_bos(stream.source_names),
        }
        self.checkpoint.check_beginnings(frozen, meta, "set PROMPT_BOS")
        config = dataclasses.asdict(self.model.config)
        model = cache.digest([_VERSION, frozen.arrays, repr(self.model), config])
        about = {"checkpoint": frozen.step, "vocabulary": ours}
        store = ReferenceStore.shared(model, about, root=self.store)
        if wanted := _wanted(stream, store, steps):
            self._compute(stream, store, wanted, frozen.step)
        return ReferencedStream(stream, store, frozen.arrays)

    def _compute(
        self, stream: Any, store: ReferenceStore, wanted: Sequence[str], checkpoint: str
    ) -> None:
        """Adds the model's log-probabilities of these pairs to the store."""
        start = stream.summary()["start_token"]
        before = [] if start is None else [start]
        pairs, kind = stream.pairs(), self.model.row
        with (
            load_frozen(
                self.model,
                checkpoint,
                self.checkpoint,
                self.mesh,
                self.rules,
                encoder_decoders=True,
            ) as run,
            Bar(total=len(wanted), desc="reference", unit="pair") as bar,
        ):
            size = run.batch_size(self.batch_size, 2 * len(wanted))
            scorer = Scorer(run.model, run.params, batch_size=size, sharding=run.row_sharding)
            for first in range(0, len(wanted), _PAIRS_AT_ONCE):
                digests = wanted[first : first + _PAIRS_AT_ONCE]
                store.add(digests, _values(scorer, before, map(pairs.ids, digests), kind))
                bar.update(len(digests))


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


def _wanted(stream: Any, store: ReferenceStore, steps: int | None) -> list[str]:
    """Returns the digests missing in the store of any process, in the stream's order, the same in all processes.

    A process sees only its own disk, but all processes compute the missing values together.
    """
    digests = list(stream.pairs().digests)
    if steps is not None and steps * stream.batch_size < len(digests):
        rows = (stream.row_ids(step, 0, stream.batch_size) for step in range(steps))
        digests = list(dict.fromkeys(d for batch in rows for row in batch for d in row if d))
    lacking = set(store.missing(digests))
    masks = agreement.gather(np.packbits([digest in lacking for digest in digests]).tobytes().hex())
    anywhere = np.bitwise_or.reduce([np.frombuffer(bytes.fromhex(m), np.uint8) for m in masks])
    chosen = np.unpackbits(anywhere)[: len(digests)]
    return [digest for digest, missing in zip(digests, chosen, strict=True) if missing]


def make_stream(
    *,
    reference: Reference,
    stream: Callable[..., Any],
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
    reference.check()
    opened = stream() if positions is None else stream(positions=positions)
    return reference.read(opened, steps=steps)


def make_eval_stream(
    *, task: str, reference: Reference, stream: Callable[..., Any], steps: Size | None = None
) -> ReferencedStream:
    """Returns the held-out stream of a task with reference values, for `steps` steps or the whole split."""
    opened = stream(task=task)
    return reference.read(opened, steps=None if steps is None else min(steps, opened.num_steps))
