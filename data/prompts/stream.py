"""The stream of prompts for online training of a policy: batches as a pure function of (seed, step).

Like data/stream/stream.py, but a row is one prompt, padded on the right. Shape suffixes: B rows, T length.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from espalier.common.ranges import Count, Size
from espalier.data.cache import store
from espalier.data.prompts.tasks import INFO
from espalier.data.stream import rows, stream
from espalier.data.stream.plan import Plan
from espalier.data.stream.train_stream import Stream


@dataclasses.dataclass(frozen=True)
class PromptSource(rows.Source):
    """One source of prompts, one in each row; budgets and shares count tokens of prompts."""

    feature: ClassVar[str] = "prompt"

    def prompt(self, row: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns the ids of a row's prompt, int32, and its row in the file."""
        record = int(self.plan.records[row])
        ids = self.cache.columns["prompt"].values(record).astype(np.int32)
        row_json = self.cache.columns[INFO].values(record).astype(np.uint8).tobytes()
        return ids, json.loads(row_json.decode("utf-8", "surrogatepass"))

    def _sizes(self) -> dict[str, Any]:
        return {"prompts": self.plan.num_rows, "first": self.plan.first}

    def notices(self, lengths: Mapping[str, int]) -> list[rows.Notice]:
        """Returns a message on prompts that were dropped."""
        records, dropped = self.plan.counts["records"], self.plan.counts["prompt_too_long"]
        if not dropped:
            return []
        text = (
            f"of {records:,} prompts, at MAX_PROMPT_LENGTH {lengths['targets']}, {dropped:,} ({dropped / records:.1%}) dropped "
            f"(first: {self.plan.first['prompt_too_long']}); a larger one drops fewer"
        )
        return [rows.notice("too long", dropped / records, text)]


class PromptStream(Stream):
    """An endless stream of prompts; see `make_stream`.

    Args:
        updates: number of consecutive steps that use the prompts of one batch.
        sources, phases, settings: see `data.stream.train_stream.Stream`.
    """

    _sources: tuple[PromptSource, ...]

    def __init__(self, sources: Any, phases: Any, *, updates: int = 1, **settings: Any):
        if updates < 1:
            raise ValueError(f"updates is {updates}; it must be positive.")
        self.updates = updates
        super().__init__(sources, phases, **settings)

    @property
    def num_steps(self) -> int | None:
        return None if self._end is None else self._end * self.updates

    def epochs(self, step: int) -> dict[str, float]:
        return super().epochs(-(-step // self.updates))

    def positions(self, step: int) -> dict[str, dict[str, Any]]:
        return super().positions(-(-step // self.updates))

    def check_repeats(self, steps: int) -> list[str]:
        return super().check_repeats(-(-steps // self.updates))

    def steps_for_tokens(self, tokens: float, first_step: int = 0) -> int:
        return super().steps_for_tokens(tokens, first_step // self.updates) * self.updates

    def steps_for_epochs(self, epochs: float) -> int:
        return super().steps_for_epochs(epochs) * self.updates

    def summary(self) -> dict:
        """Returns that of all streams, but no tokens with a loss: prompts have none, and completions are not known."""
        facts = super().summary()
        for phase in facts["phases"]:
            del phase["tokens_per_step"]
        return facts

    def read_batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns rows [lo, hi) of the batch of `step`.

        Returns:
            `prompt_tokens` int32 [B, T], with the start token and padded on the right; `prompt_lengths`
            int32 [B]; `source_ids` int32 [B].
        """
        source_B, _, row_B = self._locate(step, lo, hi)
        tokens_BT = np.zeros((hi - lo, self.length), np.int32)
        lengths_B = np.zeros(hi - lo, np.int32)
        before = [] if self._start_token is None else [self._start_token]
        for b, (prompt, _) in enumerate(self._prompts(source_B, row_B)):
            text = [*before, *prompt]
            tokens_BT[b, : len(text)], lengths_B[b] = text, len(text)
        return {
            "prompt_tokens": tokens_BT,
            "prompt_lengths": lengths_B,
            "source_ids": source_B.astype(np.int32),
        }

    def info(self, step: int, lo: int, hi: int) -> list[dict[str, Any]]:
        """Returns the rows in the files of the prompts of `batch`."""
        source_B, _, row_B = self._locate(step, lo, hi)
        return [info for _, info in self._prompts(source_B, row_B)]

    def _prompts(
        self, source_B: np.ndarray, row_B: np.ndarray
    ) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        for source, row in zip(source_B.tolist(), row_B.tolist(), strict=True):
            yield self._sources[source].prompt(row)

    def _locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return super()._locate(step // self.updates, lo, hi)


@stream.with_settings(stream.StreamSettings, *stream.TRAINING)
def make_stream(
    *,
    mixture_or_task_name: str,
    max_prompt_length: Size,
    settings: stream.StreamSettings,
    updates: Size = 1,
    start_token: Count | None = 0,
) -> PromptStream:
    """Returns the stream of prompts of a mixture of tasks, or of one task.

    Args:
        mixture_or_task_name: registered with SeqIO, its tasks by `register_prompts`; rates are shares of prompts'
            tokens.
        max_prompt_length: length of a row, the start token included; longer prompts are dropped and counted.
        updates: number of consecutive steps that use each batch.
        start_token: id that the model reads before each prompt; None if prompts begin with BOS themselves.

    `data.stream.stream.make_stream` describes the other arguments.

    Raises:
        ValueError: the mixture or the settings cannot be streamed; raised before any batch is read.
    """
    return stream.open_mixture(
        mixture_or_task_name,
        settings,
        functools.partial(_plan_source, max_length=max_prompt_length, start_token=start_token),
        PromptStream,
        updates=updates,
        start_token=start_token,
    )


def _plan_source(
    name: str, opened: store.Cache, *, max_length: int, start_token: int | None
) -> PromptSource:
    """Returns a source with a row for each prompt that fits into one."""
    remedy = " Register prompts with data.prompts.tasks.register_prompts."
    rows.check_features(name, opened, ("prompt", INFO), remedy)
    read = np.asarray(opened.columns["prompt"].lengths, np.int64) + int(start_token is not None)
    rows.check_prompts(name, opened, read > 0)
    fits = read <= max_length
    if not fits.any():
        raise ValueError(
            f"Source {name!r}: all {len(fits):,} prompts have more than {max_length} tokens; raise "
            "max_prompt_length."
        )
    records = np.flatnonzero(fits).astype(np.uint32)
    long = read > max_length
    plan = Plan(
        row_starts=np.arange(len(records) + 1, dtype=np.int64),
        records=records,
        offsets=np.zeros(len(records), np.uint32),
        lengths={"targets": read[records].astype(np.uint32)},
        row_lengths={"targets": max_length},
        packing="examples",
        long_documents="drop",
        counts={"records": len(fits), "prompt_too_long": int(long.sum())},
        first={"prompt_too_long": opened.name_of(int(long.argmax()))} if long.any() else {},
    )
    return PromptSource(name, opened, plan)
