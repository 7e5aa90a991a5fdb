"""Row plans: which pieces of which records make up each row of a source.

A plan holds offsets, never tokens, so a new context length or packing policy needs no new
tokenisation. A record is an example of the token cache (for language models, a document). A segment
is a piece of one record inside one row. The content of a row is the same in all epochs; only the
order of rows changes.

Shape suffixes: N records, P pieces of records, S segments (pieces in row order), R rows.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from espalier.common.ranges import check_choice

Packing = Literal["best_fit", "concat", "examples"]
LongDocuments = Literal["split", "truncate", "drop"]
LOSS_WEIGHTS = "loss_weights"  # the feature that weighs each target token
MAX_SEGMENTS = 64
_OPEN_ROWS = 32  # rows that still accept records when several features are packed together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows as ranges of segments: row r holds segments `row_starts[r]` to `row_starts[r + 1]`.

    The arrays are in memory, or files that are read in place (data/stream/stored_plan.py).

    Attributes:
        row_starts: int64 [R + 1].
        records: `record_dtype` [S], the record of each segment.
        offsets: uint32 [S], the segment's first token within its record; above 0, the segment
            continues a record.
        lengths: feature -> uint32 [S], tokens of each segment; only 'targets' for language models.
        row_lengths: feature -> tokens per row.
        packing, long_documents: the policies of `make_plan`.
        counts: numbers of records, empty_records (skipped: no targets), long_records (longer than a
            row), cut_segments (start inside a record) and dropped_tokens.
        first: key of `counts` -> id of the first record counted there, of those that are dropped or truncated.
        first_long: number of the first record that is longer than a row; None without any.
        inputs_prefix: ids before the inputs of every record, which `lengths` count.
        begins: feature -> int64 [S], the index in the column of each segment's first token; empty for a plan in memory,
            for which they are computed.
        loss_tokens: the sum of the loss weights of all tokens, of a stored plan; None where it is computed, or without weights.
    """

    row_starts: np.ndarray
    records: np.ndarray
    offsets: np.ndarray
    lengths: dict[str, np.ndarray]
    row_lengths: dict[str, int]
    packing: str
    long_documents: str
    counts: dict[str, int]
    first: dict[str, str] = dataclasses.field(default_factory=dict)
    first_long: int | None = None
    inputs_prefix: tuple[int, ...] = ()
    begins: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    loss_tokens: float | None = None

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def policy(self) -> list:
        """The settings that determine which records lie in which row, as JSON."""
        return policy_of(self.row_lengths, self.packing, self.long_documents, self.inputs_prefix)

    def tokens(self, feature: str = "targets") -> int:
        return int(self.lengths[feature].sum(dtype=np.int64))

    def fill(self, feature: str = "targets") -> float:
        """Returns the share of the feature's positions that hold tokens, over all rows."""
        return self.tokens(feature) / max(1, self.num_rows * self.row_lengths[feature])


def policy_of(
    row_lengths: Mapping[str, int],
    packing: str,
    long_documents: str,
    inputs_prefix: Sequence[int] = (),
) -> list:
    """Returns the settings of `make_plan` as JSON, which stands in the fingerprints of streams."""
    prefix = [list(inputs_prefix)] if inputs_prefix else []
    return [dict(row_lengths), packing, long_documents, *prefix]


def record_dtype(records: int) -> np.dtype:
    """Returns the dtype of the numbers of this many records: of 32 bits, if these are enough."""
    return np.dtype("<u4" if records <= 2**32 else "<i8")


def make_plan(
    lengths: Mapping[str, np.ndarray],
    row_lengths: Mapping[str, int],
    *,
    packing: str = "best_fit",
    long_documents: str = "split",
    inputs_prefix: Sequence[int] = (),
) -> Plan:
    """Plans the rows of one source.

    Args:
        lengths: feature -> tokens of every record, [N].
        row_lengths: feature -> tokens per row.
        packing: 'best_fit' cuts records at the row length and packs the pieces, longest first, each
            into the row with the least sufficient room. 'concat' concatenates records and cuts at
            row ends. 'examples' puts one piece of one record in a row. With several features (for
            an encoder-decoder) 'best_fit' packs whole records, each into the first open row with
            room for all its features.
        long_documents: 'split' cuts records longer than a row into several pieces; 'truncate' drops
            the tokens after the first row; 'drop' leaves these records out. Records of several
            features cannot be split.
        inputs_prefix: ids before the inputs of every record.

    Raises:
        ValueError: a setting is unknown, a row length is not positive, the policy does not work
            with several features, or a prefix has no inputs or no room.
    """
    check_choice("packing", packing, Packing)
    check_choice("long_documents", long_documents, LongDocuments)
    for feature, length in row_lengths.items():
        if length < 1:
            raise ValueError(f"task_feature_lengths[{feature!r}] is {length}; it must be positive.")
    full = {feature: np.asarray(lengths[feature], np.int64) for feature in row_lengths}
    if inputs_prefix:
        _check_prefix(row_lengths, len(inputs_prefix))
        full["inputs"] = full["inputs"] + len(inputs_prefix)
    make = _plan_single if len(row_lengths) == 1 else _plan_tuples
    too_long = np.any([full[f] > row_lengths[f] for f in row_lengths], axis=0)
    first_long = int(too_long.argmax()) if too_long.any() else None
    planned = full
    if long_documents == "drop":
        planned = {feature: np.where(too_long, 0, sizes) for feature, sizes in full.items()}
    row_starts, records, offsets, sizes = make(planned, dict(row_lengths), packing, long_documents)
    num_planned = sum(int(size.sum()) for size in sizes.values())
    return Plan(
        row_starts=row_starts,
        # 32 bits: a plan should stay small beside the tokens it describes.
        records=records.astype(record_dtype(len(too_long))),
        offsets=offsets.astype(np.uint32),
        lengths={feature: size.astype(np.uint32) for feature, size in sizes.items()},
        row_lengths=dict(row_lengths),
        packing=packing,
        long_documents=long_documents,
        counts={
            "records": len(too_long),
            "empty_records": int((full[_main(row_lengths)] == 0).sum()),
            "long_records": int(too_long.sum()),
            "cut_segments": int((offsets > 0).sum()),
            "dropped_tokens": sum(int(x.sum()) for x in full.values()) - num_planned,
        },
        first_long=first_long,
        inputs_prefix=tuple(inputs_prefix),
    )


def check_loss_weights(
    where: str, targets_N: np.ndarray, lengths_N: np.ndarray, values: Iterable[np.ndarray]
) -> None:
    """Raises ValueError if records have loss weights of a wrong number or value.

    Args:
        where: what has them, for the message.
        targets_N: number of the targets of each record.
        lengths_N: number of its weights.
        values: the weights, in any number of arrays.
    """
    targets_N, lengths_N = np.asarray(targets_N), np.asarray(lengths_N)
    differ = np.flatnonzero(lengths_N != targets_N)
    if len(differ):
        record = int(differ[0])
        raise ValueError(
            f"{where} has {lengths_N[record]} values for the {targets_N[record]} targets of record {record}: every target "
            "needs one, BOS and EOS too (make the weights after they are added)."
        )
    if not all(np.all((part >= 0) & (part < np.inf)) for part in map(np.asarray, values)):
        raise ValueError(f"{where} has values that are negative or not finite.")


def _check_prefix(row_lengths: Mapping[str, int], count: int) -> None:
    if "inputs" not in row_lengths:
        raise ValueError(
            "The inputs of a model with prompt tuning begin with its virtual tokens, and these rows are made of 'targets' alone: "
            "train on a task of inputs with targets, TASK_FEATURE_LENGTHS = {'inputs': ..., 'targets': ...}."
        )
    if row_lengths["inputs"] <= count:
        raise ValueError(
            f"task_feature_lengths['inputs'] is {row_lengths['inputs']}, and {count} virtual tokens come before the inputs: "
            "lengthen the rows."
        )


def _main(row_lengths: Mapping[str, int]) -> str:
    """Returns the feature that is trained on; records where it is empty are skipped."""
    return "targets" if "targets" in row_lengths else next(iter(row_lengths))


_Segments = tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]


def _plan_single(full, row_lengths, packing: str, long_documents: str) -> _Segments:
    """Returns (row starts, records, offsets, lengths) for one feature."""
    ((feature, length),) = row_lengths.items()
    lengths_N = full[feature]
    if long_documents == "truncate":
        lengths_N = np.minimum(lengths_N, length)
    if packing == "concat":
        return _cut_at(feature, lengths_N, _concat_row_ends(lengths_N, length))
    records_P, offsets_P, sizes_P = _pieces(lengths_N, length)
    rows_P = best_fit(sizes_P, length) if packing == "best_fit" else np.arange(len(sizes_P))
    order = np.argsort(rows_P, kind="stable")  # within a row, the order of the corpus
    return starts(rows_P), records_P[order], offsets_P[order], {feature: sizes_P[order]}


def _plan_tuples(full, row_lengths, packing: str, long_documents: str) -> _Segments:
    """Returns `_plan_single`'s arrays for records with several features, which are never split."""
    if packing == "concat":
        raise ValueError(
            f"packing='concat' needs a single feature, but there are {', '.join(row_lengths)}: use "
            "'best_fit' or 'examples'."
        )
    is_long = np.any([full[f] > row_lengths[f] for f in row_lengths], axis=0)
    if long_documents == "split" and is_long.any():
        record = int(np.argmax(is_long))
        sizes = {f: int(full[f][record]) for f in row_lengths}
        raise ValueError(
            f"{int(is_long.sum())} records are longer than task_feature_lengths {row_lengths} (the "
            f"first: record {record}, {sizes}) and records of several features cannot be split: "
            "set LONG_DOCUMENTS (long_documents) = 'truncate' to cut their ends, 'drop' to leave them out, or larger "
            "TASK_FEATURE_LENGTHS."
        )
    records = np.flatnonzero(full[_main(row_lengths)] > 0)
    sizes_F = {f: np.minimum(full[f], row_lengths[f])[records] for f in row_lengths}
    if packing == "best_fit":
        rows = first_fit(np.stack(list(sizes_F.values())), list(row_lengths.values()))
    else:
        rows = np.arange(len(records))
    order = np.argsort(rows, kind="stable")
    sizes_F = {feature: size[order] for feature, size in sizes_F.items()}
    return starts(rows), records[order], np.zeros(len(records), np.int64), sizes_F


def _pieces(lengths_N: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts records into pieces of at most `length`; returns (record, offset, size), each [P]."""
    pieces_N = -(-lengths_N // length)
    records_P = np.repeat(np.arange(len(lengths_N)), pieces_N)
    index_P = np.arange(len(records_P)) - np.repeat(np.cumsum(pieces_N) - pieces_N, pieces_N)
    offsets_P = index_P * length
    return records_P, offsets_P, np.minimum(lengths_N[records_P] - offsets_P, length)


def best_fit(sizes_P: np.ndarray, length: int) -> np.ndarray:
    """Returns the row of each piece, of at most `length` tokens, by best-fit decreasing, [P].

    Bit f of `free` is set when some open row has exactly f free positions. The tightest row that
    fits a piece is therefore the lowest set bit at or above the piece's size.
    """
    rows_P = np.empty(len(sizes_P), np.int64)
    order = np.argsort(-sizes_P, kind="stable")
    num_full = int((sizes_P == length).sum())
    rows_P[order[:num_full]] = np.arange(num_full)
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]
    segments: list[int] = []
    free = 0
    for piece, size in zip(
        order[num_full:].tolist(), sizes_P[order[num_full:]].tolist(), strict=True
    ):
        fitting = free >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                free ^= 1 << room
            segments[row] += 1
        else:
            room, row = length, len(segments)
            segments.append(1)
        rows_P[piece] = num_full + row
        room -= size
        if room and segments[row] < MAX_SEGMENTS:
            if not open_rows[room]:
                free |= 1 << room
            open_rows[room].append(row)
    return rows_P


def _concat_row_ends(lengths_N: np.ndarray, length: int) -> np.ndarray:
    """Returns the row ends in the concatenation: every `length` tokens, or after 64 segments."""
    ends_N = np.cumsum(lengths_N[lengths_N > 0])
    total = int(ends_N[-1]) if len(ends_N) else 0
    row_ends, at = [], 0
    while at < total:
        last = int(np.searchsorted(ends_N, at, side="right")) + MAX_SEGMENTS - 1
        at = min(at + length, int(ends_N[last]) if last < len(ends_N) else total)
        row_ends.append(at)
    return np.array(row_ends, np.int64)


def _cut_at(feature: str, lengths_N: np.ndarray, row_ends_R: np.ndarray) -> _Segments:
    """Cuts the concatenation at the ends of records and of rows; returns the segments."""
    records = np.flatnonzero(lengths_N)
    ends = np.cumsum(lengths_N[records])
    cuts_S = np.union1d(ends, row_ends_R)
    begins_S = np.concatenate([[0], cuts_S])[:-1]
    index_S = np.searchsorted(ends, begins_S, side="right")
    offsets_S = begins_S - (ends - lengths_N[records])[index_S]
    row_starts = np.concatenate([[0], np.searchsorted(cuts_S, row_ends_R) + 1])
    return row_starts, records[index_S], offsets_S, {feature: cuts_S - begins_S}


def first_fit(sizes_FP: np.ndarray, capacities_F: list[int]) -> np.ndarray:
    """Returns the row of each record by first fit, oldest open row first.

    A record fits a row where every feature has room.
    """
    rows_P = np.empty(sizes_FP.shape[1], np.int64)
    open_rows: collections.deque = collections.deque()  # [row, segments, room per feature]
    num_rows = 0
    for piece, sizes in enumerate(sizes_FP.T.tolist()):
        for entry in open_rows:
            if all(size <= room for size, room in zip(sizes, entry[2], strict=True)):
                break
        else:
            entry = [num_rows, 0, list(capacities_F)]
            num_rows += 1
            if len(open_rows) == _OPEN_ROWS:
                open_rows.popleft()
            open_rows.append(entry)
        rows_P[piece] = entry[0]
        entry[1] += 1
        entry[2] = [room - size for size, room in zip(sizes, entry[2], strict=True)]
        if entry[1] == MAX_SEGMENTS:
            open_rows.remove(entry)
    return rows_P


def starts(rows_P: np.ndarray) -> np.ndarray:
    """Returns each row's first segment when pieces are sorted by row, and the total: int64 [R + 1]."""
    return np.concatenate([[0], np.cumsum(np.bincount(rows_P))]).astype(np.int64)
