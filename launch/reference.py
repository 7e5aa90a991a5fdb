"""Streams of preference pairs with a reference model's log-probabilities, from the store or computed before training.

In a run these stand where the streams of pairs would: `train.train.stream = @reference.make_stream`.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from data import cache
from data.reference_store import ReferencedStream, ReferenceStore
from launch.load_run import RunConfig
from trainers import step_dir
from trainers.scoring import Row, Scorer

_VERSION = 1  # raise it when the same model and tokens begin to give other values
_PAIRS_AT_ONCE = 4096  # after which what is known is written


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reference:
    """The model that a policy is compared with.

    Attributes:
      model: the linen module.
      checkpoint: step or run directory; most often what the policy starts from.
      use_ema: read the moving average of its parameters, as where the policy starts from that
        (train.initial_use_ema).
      batch_size: sequences at a time.
      mesh, rules: to run it on.
      store: directory of known values; None for the one in the cache directory.
    """

    model: Any
    checkpoint: str | None
    use_ema: bool = False
    batch_size: int = 8
    mesh: Mapping[str, int] | None = None
    rules: str = "fsdp_tp"
    store: str | os.PathLike | None = None

    def __post_init__(self):
        if self.checkpoint is None:
            raise ValueError(
                "REFERENCE is None: name the checkpoint that the policy is compared with, which is most often "
                "what it starts from (INITIAL_CHECKPOINT_PATH)."
            )

    def read(self, stream: Any) -> ReferencedStream:
        """The stream with the reference's values, those computed first that nobody has asked for yet.

        Raises:
          ValueError: the reference was trained with another vocabulary.
          ReferenceStoreError: a damaged store.
          DamagedCheckpointError, FileNotFoundError: of the checkpoint.
        """
        step, model, meta = step_dir.newest_good(self.checkpoint, self._identify)
        ours = stream.summary()["vocabulary"]["digest"]
        theirs = meta.get("vocabulary", ours)
        if theirs != ours:
            raise ValueError(
                f"REFERENCE: {step} was trained with another vocabulary (digest {theirs[:12]}) than this run's "
                f"data has ({ours[:12]}): use the vocabulary of the reference."
            )
        about = {"checkpoint": str(step), "vocabulary": ours}
        store = ReferenceStore(model, about, root=self.store)
        self._compute(stream, store, str(step))
        return ReferencedStream(stream, store, model)

    def _identify(self, step: Any) -> tuple[Any, str, Mapping[str, Any]]:
        """(step directory, digest of the parameters and of what they mean, what the run recorded)."""
        recorded = step_dir.read_manifest(step)
        root = "ema_params/" if self.use_ema else "params/"
        arrays = {
            name.removeprefix(root): [str(entry), f"{entry.digest:016x}"]
            for name, entry in recorded.arrays.items()
            if name.startswith(root)
        }
        config = dataclasses.asdict(self.model.config)
        model = cache.digest([_VERSION, arrays, repr(self.model), config])
        return step, model, step_dir.read_record(step, recorded)["meta"]

    def _compute(self, stream: Any, store: ReferenceStore, checkpoint: str) -> None:
        """Adds to the store what it lacks of the stream's pairs."""
        known = {digest: ids for digest, *ids in stream.pairs()}
        wanted = store.missing(known)
        if not wanted:
            return
        start = stream.summary()["start_token"]
        before = [] if start is None else [start]
        config = RunConfig(
            model=self.model, vocabulary=lambda: None, mesh=self.mesh, rules=self.rules
        )
        with config.load(checkpoint, params="ema" if self.use_ema else "raw") as run:
            rows = [
                Row(context=[*before, *prompt], targets=completion)
                for prompt, *completions in (known[digest] for digest in wanted)
                for completion in completions
            ]
            size = run.batch_size(self.batch_size, len(rows))
            scorer = Scorer(run.model, run.params, batch_size=size, sharding=run.row_sharding)
            sums = (float(np.sum(log_probs, dtype=np.float64)) for log_probs in scorer.stream(rows))
            for first in range(0, len(wanted), _PAIRS_AT_ONCE):
                digests = wanted[first : first + _PAIRS_AT_ONCE]
                values = np.fromiter(itertools.islice(sums, 2 * len(digests)), np.float32)
                store.add(digests, values.reshape(-1, 2), write=jax.process_index() == 0)


def make_stream(
    *,
    reference: Reference,
    stream: Callable[..., Any],
    positions: Mapping[str, Any] | None = None,
) -> ReferencedStream:
    """The training stream of pairs that `stream` opens, called with (positions=) to read on where a run stopped."""
    return reference.read(stream() if positions is None else stream(positions=positions))


def make_eval_stream(
    *, task: str, reference: Reference, stream: Callable[..., Any]
) -> ReferencedStream:
    """The held-out stream of a task, which `stream` opens, called with (task=)."""
    return reference.read(stream(task=task))
