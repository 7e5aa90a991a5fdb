"""Row plans of preference pairs: the pairs of each row, and how far each is truncated.

Shape suffixes: N records, E end tokens, P pairs in row order, R rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from espalier.common.ranges import check_choice
from espalier.data.cache.cache_files import Column
from espalier.data.cache.store import Cache
from espalier.data.stream.plan import Plan, best_fit, first_fit, starts
from espalier.data.stream.rows import check_features, check_prompts

Packing = Literal["examples", "best_fit"]
FEATURES = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairPlan(Plan):
    """Rows of pairs: a segment of a `Plan` is a pair here, which takes two segments of a row.

    `lengths` are the lengths of `prompt`, `chosen` and `rejected` after truncation, uint32 [P].
    """

    max_length: int  # most tokens of a prompt with one completion
    # number of tokens (0 or 1) at the beginning of a prompt that are read but not predicted
    read_only: int
    # number of positions (0 or 1) after a completion that read its last token and predict nothing
    read_last: int = 0
    # ids that end completions, the last of which is then read as the first of these ids; empty if it is in all completions
    ends: tuple[int, ...] = ()

    @property
    def policy(self) -> list:
        last = ["read_last", *self.ends] if self.read_last else []
        return [*super().policy, self.max_length, self.read_only, *last]

    @property
    def slots(self) -> int:
        """Returns the most pairs of any row."""
        return int(np.diff(self.row_starts).max())

    def tokens(self, feature: str = "targets") -> int:
        """Returns the number of tokens of a feature; by default of both completions, which have loss weights."""
        if feature != "targets":
            return super().tokens(feature)
        return self.tokens("chosen") + self.tokens("rejected")

    @property
    def encodes(self) -> bool:
        """Whether an encoder reads the prompts, and the completions alone are targets."""
        return "inputs" in self.row_lengths

    def positions(self) -> int:
        """Returns the number of filled positions of all rows, of targets."""
        pairs = len(self.records)
        if self.encodes:
            return self.tokens() + 2 * self.read_last * pairs
        return 2 * (self.tokens("prompt") + self._more * pairs) + self.tokens()

    @property
    def _more(self) -> int:
        """Returns the number of positions of a segment minus the number of its tokens."""
        return self.read_last - self.read_only


def plan_pairs(
    name: str,
    opened: Cache,
    *,
    row_length: int,
    max_length: int | None = None,
    packing: Packing = "examples",
    read_only: int = 0,
    read_last: int = 0,
    ends: Sequence[int] = (),
    inputs_length: int | None = None,
) -> PairPlan:
    """Plans the rows of one source of pairs.

    A completion is truncated at its end if prompt and completion together have more than `max_length` tokens.
    A pair is dropped if its prompt leaves no room for a completion token, or if its truncated completions are
    equal.

    With `inputs_length`, an encoder reads the prompts, once for each completion. `max_length` is then of a completion
    alone, and a pair is dropped if its prompt is longer than half of the inputs.

    Args:
        row_length: positions of a row.
        max_length: most tokens of a prompt with one completion; default the most that fit into half a row.
        inputs_length: positions of the encoder in a row; None for a decoder.
        packing: 'examples' puts one pair in a row, 'best_fit' as many as fit, the largest first.
        read_only, read_last: see `PairPlan`.
        ends: with `read_last`, ids that end completions. What follows the last of them in a completion is not read, and it
            is read as the first of them. Completions without one are read whole, and counted.

    Raises:
        ValueError: the source holds no pairs, no pair fits, or the settings do not fit together.
    """
    remedy = " Register preference data with data.preference.tasks.register_pairs."
    check_features(name, opened, FEATURES, remedy)
    check_choice("packing", packing, Packing)
    max_length = row_length // 2 - read_last if max_length is None else max_length
    if max_length < 2 or row_length < 2 * (max_length + read_last):
        more = " + 1 (the position that reads its last token)" if read_last else ""
        raise ValueError(
            f"max_length is {max_length} and task_feature_lengths['targets'] is {row_length}: max_length must be "
            f"at least 2, and a row needs 2 x (max_length{more}) positions. Lower max_length, or lengthen the rows."
        )
    full = {f: np.asarray(opened.columns[f].lengths, np.int64) for f in FEATURES}
    check_prompts(name, opened, full["prompt"] >= read_only)
    # Records that are read otherwise than they are stored, and those without an end.
    other_N, unended_N = np.zeros((2, len(full["prompt"])), bool)
    for feature in FEATURES[1:] if ends else ():
        end_N, id_N = _ended(opened.columns[feature], ends)
        other_N |= (end_N > 0) & ((end_N < full[feature]) | (id_N != ends[0]))
        unended_N |= end_N == 0
        full[feature] = np.where(end_N > 0, end_N, full[feature])
    room_N = max_length - full["prompt"]
    if inputs_length is not None:
        if not full["prompt"].all():
            raise ValueError(
                f"Source {name!r}: the prompt of {opened.name_of(int(full['prompt'].argmin()))} is empty, and an encoder reads "
                "at least one token: set PROMPT_EOS = True, so that prompts end with EOS."
            )
        room_N = np.where(2 * full["prompt"] <= inputs_length, max_length, 0)
    truncated = {f: np.minimum(full[f], np.maximum(room_N, 0)) for f in FEATURES[1:]}
    fits_N = room_N > 0
    cut_N = (full["chosen"] > truncated["chosen"]) | (full["rejected"] > truncated["rejected"])
    same_N = np.zeros_like(fits_N)
    if "labels" not in opened.columns:
        for record in np.flatnonzero(
            fits_N & (cut_N | other_N) & (truncated["chosen"] == truncated["rejected"])
        ):
            chosen, rejected = (
                opened.columns[f].values(record)[: truncated[f][record]] for f in FEATURES[1:]
            )
            ended = chosen[-1] == rejected[-1] or {int(chosen[-1]), int(rejected[-1])} <= {*ends}
            same_N[record] = ended and np.array_equal(chosen[:-1], rejected[:-1])
    events = {
        "prompt_too_long": ~fits_N,
        "same_when_truncated": same_N,
        "truncated": fits_N & ~same_N & cut_N,
        **({"unended": unended_N} if ends else {}),
    }
    used_N = fits_N & ~same_N
    if not used_N.any():
        raise ValueError(
            f"Source {name!r}: no pair fits max_length={max_length}. Of {len(used_N):,} pairs, "
            f"{np.sum(~fits_N):,} have prompts without room for a completion, and {same_N.sum():,} have equal "
            "completions after truncation. Raise max_length and task_feature_lengths."
        )
    records = np.flatnonzero(used_N)
    lengths = {"prompt": full["prompt"], **truncated}
    lengths = {feature: size_N[records] for feature, size_N in lengths.items()}
    prompts = 2 * lengths["prompt"]
    completions = lengths["chosen"] + lengths["rejected"] + 2 * read_last
    row_lengths = {"targets": row_length}
    if packing == "examples":
        rows = np.arange(len(records))
    elif inputs_length is None:
        rows = best_fit(prompts - 2 * read_only + completions, row_length)
    else:
        rows = first_fit(np.stack([prompts, completions]), [inputs_length, row_length])
    if inputs_length is not None:
        row_lengths["inputs"] = inputs_length
    order = np.argsort(rows, kind="stable")  # within a row, the order of the files
    lost = sum(int((full[f] - truncated[f])[records].sum()) for f in truncated)
    return PairPlan(
        row_starts=starts(rows),
        records=records[order].astype(np.uint32),
        offsets=np.zeros(len(records), np.uint32),
        lengths={feature: size[order].astype(np.uint32) for feature, size in lengths.items()},
        row_lengths=row_lengths,
        packing=packing,
        long_documents="truncate",
        counts={
            "records": len(used_N),
            **{event: int(event_N.sum()) for event, event_N in events.items()},
            "truncated_tokens": lost,
        },
        max_length=max_length,
        read_only=read_only,
        first={
            w: opened.name_of(int(event_N.argmax()))
            for w, event_N in events.items()
            if event_N.any()
        },
        read_last=read_last,
        ends=tuple(ends) if other_N.any() else (),
    )


def _ended(column: Column, ends: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of tokens of each record up to the last of `ends`, int64 [N], and its id; 0 and any id without one."""
    places, ids = [np.array([-1])], [np.array([-1])]
    for shard, begin in zip(column.shards, column.bounds[:-1].tolist(), strict=True):
        at = np.flatnonzero(np.isin(shard, ends))
        places.append(begin + at)
        ids.append(shard[at])
    place_E, id_E = np.concatenate(places), np.concatenate(ids)  # of all ends
    starts_N = np.asarray(column.starts, np.int64)
    last_N = np.searchsorted(place_E, starts_N + np.asarray(column.lengths, np.int64)) - 1
    return np.maximum(place_E[last_N] + 1 - starts_N, 0), id_E[last_N]
