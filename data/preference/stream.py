"""The training and evaluation streams of preference pairs: batches as a pure function of (seed, step).

Like data/stream/stream.py, with pairs in rows; `pair_rows.read_rows` documents the columns.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from espalier.common.end_tokens import read_ends
from espalier.common.ranges import Count, Size
from espalier.data.cache import store
from espalier.data.preference import pair_plan, pair_rows
from espalier.data.preference.pair_rows import PairSource
from espalier.data.stream import rows, stream
from espalier.data.stream.predictions import StoredStream
from espalier.data.stream.row_stream import EvalStream, RowStream
from espalier.data.stream.train_stream import Stream


@dataclasses.dataclass(frozen=True)
class DistinctPairs:
    """The distinct pairs of sources: (digest, prompt, chosen, rejected), ids as int32 arrays.

    Digests are in memory; tokens are read from disk on demand.
    """

    sources: Sequence[PairSource]
    start_token: int | None

    @functools.cached_property
    def _places(self) -> dict[str, tuple[PairSource, int]]:
        """Returns digest -> (source, index of the pair in its plan); reads all tokens once."""
        places: dict[str, tuple[PairSource, int]] = {}
        for source in self.sources:
            for pair in range(len(source.plan.records)):
                name = pair_rows.digest(*source.ids(pair), self.start_token)
                places.setdefault(name, (source, pair))
        return places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def digests(self) -> Iterable[str]:
        """Returns the digests of all pairs, in the order of the sources."""
        return self._places.keys()

    def ids(self, digest: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (prompt, chosen, rejected) of the pair with a digest."""
        source, pair = self._places[digest]
        return source.ids(pair)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
        for name, (source, pair) in self._places.items():
            yield name, *source.ids(pair)


class _PairRows(RowStream):
    """Base class of the training and evaluation streams of pairs."""

    _sources: tuple[PairSource, ...]

    @functools.cached_property
    def slots(self) -> int:
        """Returns K, the most pairs in any row."""
        return max(source.plan.slots for source in self._sources)

    @functools.cached_property
    def _has_margins(self) -> bool:
        return any(source.has_margins for source in self._sources)

    @functools.cached_property
    def _chosen_R(self) -> list[np.ndarray]:
        """Returns for each source the tokens of chosen completions in each row."""
        return [
            np.add.reduceat(s.plan.lengths["chosen"].astype(np.int64), s.plan.row_starts[:-1])
            for s in self._sources
        ]

    def read_batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns rows [lo, hi) of the batch of `step`: the columns of `pair_rows.read_rows` and one more.

        `chosen_tokens_per_pair`, float32 [hi - lo], is the same in every row: the number of tokens of chosen
        completions of the whole batch, divided by its number of pairs.
        """
        source_B, _, row_B = self._locate(step, lo, hi)
        batch = pair_rows.read_rows(
            self._sources,
            source_B,
            row_B,
            slots=self.slots,
            start_token=self._start_token,
            margins=self._has_margins,
        )
        mean = self._chosen_tokens_per_pair(step)
        batch["chosen_tokens_per_pair"] = np.full(hi - lo, mean, np.float32)
        return batch

    def row_ids(self, step: int, lo: int, hi: int) -> list[list[str]]:
        """Returns the digests of the pairs in rows [lo, hi) of the batch of `step`, K per row; '' for no pair."""
        source_B, _, row_B = self._locate(step, lo, hi)
        digests = []
        for index, row in zip(source_B.tolist(), row_B.tolist(), strict=True):
            source = self._sources[index]
            names = [
                pair_rows.digest(*source.ids(pair), self._start_token)
                for pair in source.segments(row)
            ]
            digests.append(names + [""] * (self.slots - len(names)))
        return digests

    @functools.cached_property
    def _pairs(self) -> DistinctPairs:
        return DistinctPairs(self._sources, self._start_token)

    def pairs(self) -> DistinctPairs:
        """Returns all distinct pairs of the stream, with their digests."""
        return self._pairs

    def summary(self) -> dict:
        return {
            **super().summary(),
            "max_length": self._sources[0].plan.max_length,
            "pairs_per_row": self.slots,
            "kind": "unpaired" if self._sources[0].unpaired else "paired",
        }

    def _chosen_tokens_per_pair(self, step: int) -> float:
        source_B, _, row_B = self._locate(step, 0, self.batch_size)
        tokens = pairs = 0
        for index, source in enumerate(self._sources):
            here = row_B[(source_B == index) & (row_B != rows.NO_ROW)]
            tokens += int(self._chosen_R[index][here].sum())
            pairs += int(np.diff(source.plan.row_starts)[here].sum())
        return tokens / max(1, pairs)


class PairStream(_PairRows, Stream):
    """An endless stream of pairs; see `make_stream`."""


class PairEvalStream(_PairRows, EvalStream):
    """Every held-out pair once; see `make_eval_stream`."""


class ReferencedStream(StoredStream):
    """A stream of pairs with the additional column 'reference_log_probs' [B, 2K]."""

    role = "reference"

    def columns(self, batch, step, lo, hi):
        digests_BK = self._stream.row_ids(step, lo, hi)
        values = self._store.get([digest for row in digests_BK for digest in row])
        return {"reference_log_probs": values.reshape(hi - lo, -1)}


@stream.with_settings(stream.StreamSettings, *stream.TRAINING, *stream.WEIGHTS)
def make_stream(
    *,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, Size],
    settings: stream.StreamSettings,
    max_length: Size | None = None,
    packing: pair_plan.Packing = "examples",
    read_last: bool = False,
    start_token: Count | None = 0,
) -> PairStream:
    """Returns the training stream of a mixture of tasks of preference data, or of one task.

    Shares and budgets of tokens count the tokens with loss weights: those of both completions.

    Args:
        mixture_or_task_name: registered with SeqIO, its tasks by `register_pairs`, all of the same kind.
        task_feature_lengths: {'targets': positions of a row}; with 'inputs' as well, rows are for an encoder-decoder, whose
            encoder reads each prompt twice and whose targets are the completions.
        max_length: most tokens of a prompt with one completion; default the most that fit into half a row.
            Longer completions are truncated at their end, pairs with longer prompts are dropped; `summary()`
            counts both.
        packing: 'examples' puts one pair in a row, so that a batch has `batch_size` pairs; 'best_fit' puts as
            many in a row as fit.
        read_last: add a position to every segment that reads the last token of its completion. Rewards of whole
            completions need it. A completion then ends with EOS instead of its last end token and what follows it, such as
            the end of a turn and a line break, because reward models read samples at EOS; see `common.end_tokens.read_ends`.
        start_token: id that the model reads before each prompt. None for none, if prompts begin with BOS; the
            first token of a prompt is then not predicted.

    `data.stream.stream.make_stream` describes the other arguments.

    Raises:
        ValueError: the mixture or the settings cannot be streamed; raised before any batch is read.
    """
    plan_source = _planner(task_feature_lengths, max_length, packing, read_last, start_token)
    return stream.open_mixture(
        mixture_or_task_name, settings, plan_source, PairStream, start_token=start_token
    )


@stream.with_settings(stream.StreamSettings, *stream.HELD_OUT, split="validation")
def make_eval_stream(
    *,
    task: str,
    task_feature_lengths: Mapping[str, Size],
    settings: stream.StreamSettings,
    max_length: Size | None = None,
    packing: pair_plan.Packing = "examples",
    read_last: bool = False,
    start_token: Count | None = 0,
) -> PairEvalStream:
    """Returns the evaluation stream of one task: every held-out pair once, in a fixed arbitrary order.

    `make_stream` of this module describes the arguments.

    Raises:
        data.stream.stream.NoSplitError: the task has no split of this name.
        ValueError: the task or the settings cannot be streamed.
    """
    plan_source = _planner(task_feature_lengths, max_length, packing, read_last, start_token)
    return stream.open_held_out(
        task, settings, plan_source, PairEvalStream, start_token=start_token
    )


def _planner(
    feature_lengths: Mapping[str, int],
    max_length: int | None,
    packing: pair_plan.Packing,
    read_last: bool,
    start_token: int | None,
) -> Callable[[str, store.Cache], PairSource]:
    if set(feature_lengths) not in ({"targets"}, {"inputs", "targets"}):
        raise ValueError(
            f"task_feature_lengths {dict(feature_lengths)} must give 'targets' alone, the positions of a row, or for an "
            "encoder-decoder 'inputs' as well."
        )
    if "inputs" in feature_lengths and start_token is None:
        raise ValueError(
            "start_token = None is for decoders, and task_feature_lengths has 'inputs': the targets of an encoder-decoder "
            "follow a start token."
        )

    def planned(name: str, opened: store.Cache) -> PairSource:
        from espalier.data import tasks

        return pair_rows.plan_source(
            name,
            opened,
            row_length=feature_lengths["targets"],
            inputs_length=feature_lengths.get("inputs"),
            max_length=max_length,
            packing=packing,
            read_only=int(start_token is None),
            read_last=int(read_last),
            ends=read_ends(tasks.vocabulary(name)) if read_last else (),
        )

    return planned
