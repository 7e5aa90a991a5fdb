"""Converts rows of pairs to arrays: two segments for each pair, and per-pair columns for losses.

Shape suffixes: B rows, L length, K slots for pairs in a row, P pairs of all rows, S = 2P segments.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from espalier.data.cache.store import Cache
from espalier.data.preference.pair_plan import FEATURES, PairPlan, plan_pairs
from espalier.data.stream import rows

_SHORTENED = {
    "prompt_too_long": "dropped, whose prompts leave no room",
    "same_when_truncated": "dropped, whose completions are the same once they are cut",
    "truncated": "cut at their ends",
}


@dataclasses.dataclass(frozen=True)
class PairSource(rows.Source):
    """One source of rows of pairs."""

    plan: PairPlan

    feature: ClassVar[str] = "chosen"

    @property
    def unpaired(self) -> bool:
        """Returns whether the source has completions with labels instead of pairs."""
        return "labels" in self.cache.columns

    @property
    def has_margins(self) -> bool:
        margins = self.cache.columns.get("margin")
        return margins is not None and any(np.any(np.asarray(shard)) for shard in margins.shards)

    def ids(self, pair: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the truncated ids of prompt, chosen and rejected of a pair of the plan; int32."""
        record = int(self.plan.records[pair])
        prompt, chosen, rejected = (
            self.cache.columns[f].values(record)[: self.plan.lengths[f][pair]].astype(np.int32)
            for f in FEATURES
        )
        return prompt, chosen, rejected

    def _segment_sizes(self, segment: int) -> dict[str, int]:
        return {feature: int(self.plan.lengths[feature][segment]) for feature in FEATURES}

    def _sizes(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "tokens": plan.tokens(),
            "pairs": len(plan.records),
            "rows": plan.num_rows,
            "fill": plan.positions() / (plan.num_rows * plan.row_lengths["targets"]),
            "first": plan.first,
        }

    def notices(self, lengths: Mapping[str, int]) -> list[rows.Notice]:
        """Returns messages on pairs that were dropped or cut, and on completions that a reward model reads without an end."""
        del lengths
        counts, first, records = self.plan.counts, self.plan.first, self.plan.counts["records"]
        notices = []
        if unended := counts.get("unended", 0):
            text = (
                f"of {records:,} pairs, {unended:,} ({unended / records:.1%}) have a completion without an end token of the "
                f"vocabulary (first: {first['unended']}): a reward model learns to read it at its last token, but reads samples "
                "that ended at EOS. If turns of messages end with another token, add its id to eos_token_id of the tokenizer's "
                "generation_config.json"
            )
            notices.append(rows.notice("without ends", unended / records, text))
        parts = [
            f"{counts[reason]:,} ({counts[reason] / records:.1%}) {text} (first: {first[reason]})"
            for reason, text in _SHORTENED.items()
            if counts[reason]
        ]
        if not parts:
            return notices
        dropped = (counts["prompt_too_long"] + counts["same_when_truncated"]) / records
        text = (
            f"of {records:,} pairs, at max_length {self.plan.max_length}, {', '.join(parts)}; a larger MAX_LENGTH, with "
            "rows of twice that in TASK_FEATURE_LENGTHS, loses less"
        )
        return [*notices, rows.notice("too long", dropped, text)]


def plan_source(name: str, opened: Cache, **settings: Any) -> PairSource:
    """Returns a source with planned rows; `settings` are arguments of `plan_pairs`."""
    return PairSource(name, opened, plan_pairs(name, opened, **settings))


def digest(
    prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, start_token: int | None
) -> str:
    """Returns the key of a pair in a reference store: a hash of all ids that a model reads."""
    parts = (prompt, chosen, rejected)
    head = f"{start_token} {' '.join(str(len(part)) for part in parts)}:".encode()
    ids = np.concatenate(parts).astype("<u4").tobytes()
    return hashlib.blake2b(head + ids, digest_size=16).hexdigest()


def read_rows(
    sources: Sequence[PairSource],
    source_B: np.ndarray,
    row_B: np.ndarray,
    *,
    slots: int,
    start_token: int | None,
    margins: bool,
) -> dict[str, np.ndarray]:
    """Returns the columns of rows that do not depend on other rows of the batch.

    Segment 2k + 1 of a row is the prompt and the chosen completion of pair k; segment 2k + 2 is the same prompt
    with the rejected completion. Segment id 0 is padding; positions restart with each segment. Loss weights are 1
    at completion tokens, EOS included, and 0 at prompt tokens. Without a start token, the first token of a prompt
    is read but not predicted. If the plans have `read_last`, the column `decoder_ends`, float32 [B, L], is 1 at
    the position of each segment that reads the last token of its completion, which is the first of the plan's `ends` instead of
    another.

    Where an encoder reads the prompts (`PairPlan.encodes`), the segments have the completions alone, and the columns
    `encoder_input_tokens`, `encoder_segment_ids` and `encoder_positions` the prompts in segments of the same numbers.

    Args:
        source_B, row_B: see `data.stream.rows.read_rows`.
        slots: K, the width of the columns `pair_weights` (1 for a pair, 0 for none), `pair_labels` (unpaired
            data) and `pair_margins`, float32 [B, K].
        start_token: id read before each prompt; None for no token.
        margins: whether to return `pair_margins`.
    """
    shape = (len(row_B), sources[0].plan.row_lengths["targets"])
    inputs, targets, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    number = "labels" if sources[0].unpaired else "margin"
    pair_weights, numbers = (np.zeros((len(row_B), slots), np.float32) for _ in range(2))
    read_only, read_last = int(start_token is None), sources[0].plan.read_last
    ends = np.zeros(shape, np.float32)
    place_L = np.arange(shape[1], dtype=np.int32)
    encodes = sources[0].plan.encodes
    encoder = _encoder_columns(sources, len(row_B)) if encodes else {}
    for index in np.unique(source_B[row_B != rows.NO_ROW]):
        plan, columns = sources[index].plan, sources[index].cache.columns
        here_B = np.flatnonzero((source_B == index) & (row_B != rows.NO_ROW))
        row_P, slot_P, pair_P = rows.segments(plan, row_B[here_B])
        record_P = plan.records[pair_P]
        size = {f: plan.lengths[f][pair_P].astype(np.int64) for f in FEATURES}
        prompt_S = np.repeat(size["prompt"] - read_only, 2) * (not encodes)
        target_S = prompt_S + np.stack([size["chosen"], size["rejected"]], axis=1).ravel()
        size_S = target_S + read_last
        row_S, first_B = np.repeat(row_P, 2), np.flatnonzero(slot_P == 0) * 2
        place_S = _places(size_S, first_B, row_S)
        at_S = here_B[row_S] * shape[1] + place_S

        begin_S = np.repeat(columns["prompt"].starts[record_P], 2)
        if not encodes:
            columns["prompt"].gather(begin_S + read_only, prompt_S, targets.reshape(-1), at_S)
        for turn, feature in enumerate(("chosen", "rejected")):
            begin_P = columns[feature].starts[record_P]
            at_P = (at_S + prompt_S)[turn::2]
            columns[feature].gather(begin_P, size[feature], targets.reshape(-1), at_P)
            if plan.ends:
                last_P = at_P + size[feature] - 1
                others_P = np.isin(targets.reshape(-1)[last_P], plan.ends)
                targets.reshape(-1)[last_P[others_P]] = plan.ends[0]
        id_S = np.stack([2 * slot_P + 1, 2 * slot_P + 2], axis=1).ravel()
        of_segments = [id_S, place_S, place_S + prompt_S, place_S + target_S]
        spread = rows.spread(of_segments, size_S, first_B, shape[1])
        ids, origins, completions, targets_end = spread
        segment_ids[here_B] = ids
        positions[here_B] = (place_L - origins) * (ids > 0)
        weights[here_B] = (place_L >= completions) & (place_L < targets_end)
        ends[here_B] = (place_L == targets_end) & (ids > 0)
        if start_token is None:
            once_S = np.ones_like(begin_S)
            columns["prompt"].gather(begin_S, once_S, inputs.reshape(-1), at_S)
        else:
            inputs.reshape(-1)[at_S] = start_token

        if encodes:
            read = encoder["encoder_input_tokens"]
            size_S, length = np.repeat(size["prompt"], 2), read.shape[1]
            place_S = _places(size_S, first_B, row_S)
            at_S = here_B[row_S] * length + place_S
            columns["prompt"].gather(begin_S, size_S, read.reshape(-1), at_S)
            ids, origins = rows.spread([id_S, place_S], size_S, first_B, length)
            encoder["encoder_segment_ids"][here_B] = ids
            encoder["encoder_positions"][here_B] = (np.arange(length) - origins) * (ids > 0)
        pair_weights[here_B[row_P], slot_P] = 1
        if number in columns:
            once_P, to_P = np.ones_like(record_P, np.int64), here_B[row_P] * slots + slot_P
            columns[number].gather(
                columns[number].starts[record_P], once_P, numbers.reshape(-1), to_P
            )
    shifted = np.zeros_like(targets)
    shifted[:, 1:] = targets[:, :-1]
    inputs += shifted * (positions > 0)
    batch = {
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": weights,
        "decoder_segment_ids": segment_ids,
        "decoder_positions": positions,
        "source_ids": source_B.astype(np.int32),
        "pair_weights": pair_weights,
        **encoder,
    }
    if read_last:
        batch["decoder_ends"] = ends
    if number == "labels" or margins:
        batch["pair_labels" if number == "labels" else "pair_margins"] = numbers
    return batch


def _encoder_columns(sources: Sequence[PairSource], count: int) -> dict[str, np.ndarray]:
    shape = (count, sources[0].plan.row_lengths["inputs"])
    names = ("input_tokens", "segment_ids", "positions")
    return {f"encoder_{name}": np.zeros(shape, np.int32) for name in names}


def _places(size_S: np.ndarray, first_B: np.ndarray, row_S: np.ndarray) -> np.ndarray:
    """Returns the place of each segment in its row, from the first segment of each row."""
    before_S = np.cumsum(size_S) - size_S
    return before_S - before_S[first_B][row_S]
