"""The training and evaluation streams of supervised data: batches as a pure function of (seed, step).

Like data/stream/stream.py, but without a start token the first token of a conversation is read and not predicted.
Conversations that are longer than a row are cut at their end, or left out. Shape suffixes: N records.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from espalier.common.ranges import Count, NonNegative, Size, check_choice
from espalier.data.cache import store
from espalier.data.stream import mixing, plan, rows, stream
from espalier.data.stream.row_stream import EvalStream
from espalier.data.stream.train_stream import Stream

Packing = Literal["best_fit", "examples"]
LongDocuments = Literal["truncate", "drop"]
_SHORTENED = {
    "truncated": "cut at their ends",
    "too_long": "dropped, which are longer",
    "nothing_learnt": "dropped, of which nothing that is learnt remains",
}
_REMEDY = " Register supervised data with data.chats.tasks.register_chats."


@dataclasses.dataclass(frozen=True)
class ChatSource(rows.Source):
    """One source of conversations, whose plan skips the first token of each unless a start token precedes it."""

    start_token: int | None = None  # before each conversation
    # The start token that was asked for, of conversations that begin with BOS.
    unused_start: int | None = None

    def _sizes(self) -> dict[str, Any]:
        return {
            "conversations": len(self.plan.records),
            "tokens": self.plan.tokens(),
            "loss_tokens": int(self.loss_tokens),
            "rows": self.plan.num_rows,
            "fill": self.plan.fill(),
            "first": self.plan.first,
        }

    def notices(self, lengths: Mapping[str, int]) -> list[rows.Notice]:
        """Returns a message on the sizes of the data, and on what was cut or dropped."""
        counts, first, tokens = self.plan.counts, self.plan.first, self.plan.tokens()
        parts = [
            f"{counts[reason]:,} {text} (first: {first[reason]})"
            for reason, text in _SHORTENED.items()
            if counts.get(reason)
        ]
        sizes = (
            f"{len(self.plan.records):,} conversations in {self.plan.num_rows:,} rows, {tokens:,} tokens, of which "
            f"{self.loss_tokens:,.0f} ({self.loss_tokens / tokens:.1%}) are learnt"
        )
        if self.unused_start is not None:
            sizes += f"; they begin with BOS, and not with DOCUMENT_START = {self.unused_start}"
        if not parts:
            return [("chats", sizes)]
        dropped = (counts["nothing_learnt"] + counts.get("too_long", 0)) / counts["records"]
        limit = f"at {lengths['targets']} tokens (TASK_FEATURE_LENGTHS)"
        return [rows.notice("chats", dropped, f"{sizes}; {limit}, {', '.join(parts)}")]


@stream.with_settings(stream.StreamSettings, *stream.TRAINING)
def make_stream(
    *,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, Size],
    settings: stream.StreamSettings,
    start_token: Count | None = None,
    shares: Mapping[str, NonNegative] | Literal["rates"] | None = None,
    packing: Packing = "best_fit",
    long_documents: LongDocuments = "truncate",
) -> Stream:
    """Returns the training stream of a mixture of tasks of supervised data, or of one task.

    Args:
        mixture_or_task_name: registered with SeqIO, its tasks by `register_chats`.
        task_feature_lengths: {'targets': tokens of a row}, which is also the maximum length of a conversation. Longer
            ones are truncated at their end, and dropped if nothing to learn remains; `summary()` counts both.
        start_token: token that the model reads before each conversation; None for none. Conversations that begin with
            BOS, from their chat template or tokenizer, have none.
        long_documents: 'drop' leaves conversations out that are longer than a row.
        shares: each set -> its share of the tokens, normalised; 'rates' takes the mixture's rates; None reads all
            sets equally often.
        packing: 'best_fit' puts as many conversations in a row as fit, and attention does not cross their
            boundaries; 'examples' puts one in a row.

    `data.stream.stream.make_stream` describes the other arguments.

    Raises:
        ValueError: the mixture or the settings cannot be streamed; raised before any batch is read.
    """
    weights: dict[str, Any] = {"weights": "tokens" if shares is None else "rates"}
    if isinstance(shares, Mapping):
        _, sets = mixing.find_tasks(mixture_or_task_name)
        if missing := [name for name in sets if name not in shares]:
            raise ValueError(
                f"shares (CHAT_SHARES) are of {', '.join(shares)}, and the sets are {', '.join(sets)}: give {', '.join(missing)} a "
                "share too, 0 for none."
            )
        weights["phases"] = ((0, shares),)
    settings = dataclasses.replace(settings, **weights)
    plan_source = _planner(task_feature_lengths, packing, long_documents, start_token)
    return stream.open_mixture(mixture_or_task_name, settings, plan_source, _training_stream)


@stream.with_settings(stream.StreamSettings, *stream.HELD_OUT, split="validation")
def make_eval_stream(
    *,
    task: str,
    task_feature_lengths: Mapping[str, Size],
    settings: stream.StreamSettings,
    start_token: Count | None = None,
    packing: Packing = "best_fit",
    long_documents: LongDocuments = "truncate",
) -> EvalStream:
    """Returns the evaluation stream of one task: every held-out conversation once, in a fixed arbitrary order.

    `make_stream` of this module describes the arguments.

    Raises:
        data.stream.stream.NoSplitError: the task has no split of this name.
        ValueError: the task or the settings cannot be streamed.
    """
    plan_source = _planner(task_feature_lengths, packing, long_documents, start_token)
    return stream.open_held_out(task, settings, plan_source, _held_out_stream)


def _training_stream(sources: Sequence[ChatSource], *args: Any, **settings: Any) -> Stream:
    starts = {source.name: source.start_token for source in sources}
    if len(set(starts.values())) > 1:
        raise ValueError(
            f"Some sets begin with BOS, and others with a start token ({starts}), but prompts of a run all begin alike: set "
            "DOCUMENT_START = None, or train on these sets in runs of their own."
        )
    return Stream(sources, *args, start_token=sources[0].start_token, **settings)


def _held_out_stream(source: ChatSource, **settings: Any) -> EvalStream:
    return EvalStream(source, start_token=source.start_token, **settings)


def _planner(
    feature_lengths: Mapping[str, int],
    packing: Packing,
    long_documents: LongDocuments,
    start: int | None,
) -> Callable[[str, store.Cache], ChatSource]:
    def plan_source(name: str, opened: store.Cache) -> ChatSource:
        (task,), _ = mixing.find_tasks(name)
        return plan_chats(
            name,
            opened,
            feature_lengths=feature_lengths,
            packing=packing,
            long_documents=long_documents,
            start_token=start,
            bos_id=getattr(task.output_features["targets"].vocabulary, "bos_id", None),
        )

    return plan_source


def plan_chats(
    name: str,
    opened: store.Cache,
    *,
    feature_lengths: Mapping[str, int],
    packing: Packing,
    long_documents: LongDocuments = "truncate",
    start_token: int | None = None,
    bos_id: int | None = None,
) -> ChatSource:
    """Returns a source with planned rows of conversations; `start_token` precedes those that do not begin with `bos_id`.

    Raises:
        ValueError: the cache has no supervised data, a setting is invalid, or nothing can be learnt in this row length.
    """
    check_choice("packing", packing, Packing)
    check_choice("long_documents", long_documents, LongDocuments)
    if set(feature_lengths) != {"targets"} or feature_lengths["targets"] < 2:
        raise ValueError(
            f"task_feature_lengths {dict(feature_lengths)} must give 'targets' alone, the tokens of a row, at least 2."
        )
    rows.check_features(name, opened, ("targets", rows.LOSS_WEIGHTS), _REMEDY)
    length = feature_lengths["targets"]
    full_N = np.asarray(opened.columns["targets"].lengths, np.int64)
    size_N = np.minimum(full_N, length)
    begins_with_bos = opened.columns["targets"].values(0)[:1].tolist() == [bos_id]
    start = None if begins_with_bos else start_token
    # Without a start token, the first token is the input before the first target.
    skipped = int(start is None)
    starts_N = np.asarray(opened.columns["targets"].starts)
    learnt_N = opened.columns[rows.LOSS_WEIGHTS].sums(starts_N + skipped, size_N - skipped)
    long_N = full_N > length
    dropped_N = long_N & (long_documents == "drop")
    used_N = (learnt_N > 0) & ~dropped_N
    if not used_N.any():
        raise ValueError(
            f"Source {name!r}: no conversation has a token to learn within its first {length} tokens"
            f"{f', but for {dropped_N.sum()} longer ones, which are dropped' if dropped_N.any() else ''}. Raise "
            "task_feature_lengths."
        )
    planned = plan.make_plan(
        {"targets": np.where(used_N, size_N - skipped, 0)}, feature_lengths, packing=packing
    )
    events = {
        "truncated": long_N & used_N,
        "too_long": dropped_N,
        "nothing_learnt": ~used_N & ~dropped_N,
    }
    planned = dataclasses.replace(
        planned,
        offsets=np.full_like(planned.offsets, skipped),
        long_documents=long_documents,
        counts={
            "records": len(full_N),
            **{event: int(event_N.sum()) for event, event_N in events.items()},
            "truncated_tokens": int((full_N - size_N)[used_N].sum()),
        },
        first={
            event: opened.name_of(int(event_N.argmax()))
            for event, event_N in events.items()
            if event_N.any()
        },
    )
    unused = start_token if begins_with_bos and start_token != bos_id else None
    return ChatSource(name, opened, planned, start, unused)
