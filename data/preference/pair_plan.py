"""Row plans of preference pairs: the pairs of each row, and how far each is truncated.

Shape suffixes: N records, P pairs in row order, R rows.
"""

import dataclasses
from typing import Literal, get_args

import numpy as np

from data.cache.store import Cache
from data.stream.plan import Plan, best_fit, starts

Packing = Literal["examples", "best_fit"]
PACKINGS = get_args(Packing)
FEATURES = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class PairPlan(Plan):
    """Rows of pairs: the segments of a `Plan` are pairs here, each of which takes two places of a row.

    `lengths` are those of `prompt`, `chosen` and `rejected` as truncated, uint32 [P].

    Attributes:
        max_length: tokens of a prompt with one completion, at most.
        read_only: tokens at the beginning of a prompt that are read and not predicted, 0 or 1.
        read_last: places after a completion where its last token is read and nothing predicted, 0 or 1.
        first: what `counts` counts -> id of the first record it happened to.
    """

    max_length: int
    read_only: int
    first: dict[str, str]
    read_last: int = 0

    @property
    def policy(self) -> list:
        last = ["read_last"] if self.read_last else []
        return [*super().policy, self.max_length, self.read_only, *last]

    @property
    def slots(self) -> int:
        """The most pairs of any row."""
        return int(np.diff(self.row_starts).max())

    def tokens(self, feature: str = "targets") -> int:
        """Tokens of a feature; by default those with a weight in the loss, of both completions."""
        if feature != "targets":
            return super().tokens(feature)
        return self.tokens("chosen") + self.tokens("rejected")

    def positions(self) -> int:
        """The number of filled places of rows."""
        pairs = len(self.records)
        return 2 * (self.tokens("prompt") + self._more * pairs) + self.tokens()

    @property
    def _more(self) -> int:
        """Places of a segment besides its tokens."""
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
) -> PairPlan:
    """Plans the rows of one source of pairs.

    A completion is cut at its end where prompt and completion have more than `max_length` tokens. A pair
    whose prompt leaves no room for a token of its completions is dropped, and so is one whose completions
    are the same once they are cut.

    Args:
        name: of the source, for errors.
        opened: its cache.
        row_length: places of a row.
        max_length: tokens of a prompt with one completion; default what half of the row holds.
        packing: 'examples' puts one pair in a row, 'best_fit' as many as fit, the largest first.
        read_only, read_last: see `PairPlan`.

    Raises:
        ValueError: what cannot be planned.
    """
    missing = [feature for feature in FEATURES if feature not in opened.columns]
    if missing:
        raise ValueError(
            f"Source {name!r} has no feature {missing[0]!r}, only {', '.join(opened.columns)}: it holds no "
            "preference data. Register it with data.preference.tasks.register_pairs."
        )
    if packing not in PACKINGS:
        raise ValueError(f"packing={packing!r} is none of {', '.join(map(repr, PACKINGS))}.")
    max_length = row_length // 2 - read_last if max_length is None else max_length
    if max_length < 2 or row_length < 2 * (max_length + read_last):
        more = " and a place more, where its last token is read," if read_last else ""
        raise ValueError(
            f"max_length is {max_length} and task_feature_lengths['targets'] {row_length}: a pair takes a "
            f"row of twice max_length{more} which is 2 or more. Lower max_length, or lengthen the rows."
        )
    full = {f: opened.columns[f].lengths.astype(np.int64) for f in FEATURES}
    empty_N = full["prompt"] < read_only
    if empty_N.any():
        raise ValueError(
            f"Source {name!r}: the prompt of {opened.name_of(int(empty_N.argmax()))} is empty, and "
            "start_token=None puts nothing before it. Set start_token, or add_bos=True of the task."
        )
    room_N = max_length - full["prompt"]
    kept = {f: np.minimum(full[f], np.maximum(room_N, 0)) for f in FEATURES[1:]}
    fits_N = room_N > 0
    cut_N = (full["chosen"] > kept["chosen"]) | (full["rejected"] > kept["rejected"])
    same_N = np.zeros_like(fits_N)
    if "labels" not in opened.columns:
        for record in np.flatnonzero(fits_N & cut_N & (kept["chosen"] == kept["rejected"])):
            chosen, rejected = (
                opened.columns[f].values(record)[: kept[f][record]] for f in FEATURES[1:]
            )
            same_N[record] = np.array_equal(chosen, rejected)
    met = {
        "prompt_too_long": ~fits_N,
        "same_when_truncated": same_N,
        "truncated": fits_N & ~same_N & cut_N,
    }
    kept_N = fits_N & ~same_N
    if not kept_N.any():
        raise ValueError(
            f"Source {name!r}: of its {len(kept_N):,} pairs none is left. max_length={max_length} leaves no "
            f"room after the prompts of {np.sum(~fits_N):,}, and makes the completions of {same_N.sum():,} the "
            "same. Raise max_length and task_feature_lengths."
        )
    records = np.flatnonzero(kept_N)
    lengths = {"prompt": full["prompt"], **kept}
    lengths = {feature: size_N[records] for feature, size_N in lengths.items()}
    prompts = lengths["prompt"] - read_only + read_last
    sizes = 2 * prompts + lengths["chosen"] + lengths["rejected"]
    rows = best_fit(sizes, row_length) if packing == "best_fit" else np.arange(len(records))
    order = np.argsort(rows, kind="stable")  # within a row, the order of the files
    lost = sum(int((full[f] - kept[f])[records].sum()) for f in kept)
    return PairPlan(
        row_starts=starts(rows),
        records=records[order].astype(np.uint32),
        offsets=np.zeros(len(records), np.uint32),
        lengths={feature: size[order].astype(np.uint32) for feature, size in lengths.items()},
        row_lengths={"targets": row_length},
        packing=packing,
        long_documents="truncate",
        counts={
            "records": len(kept_N),
            **{what: int(met_N.sum()) for what, met_N in met.items()},
            "truncated_tokens": lost,
        },
        max_length=max_length,
        read_only=read_only,
        first={w: opened.name_of(int(met_N.argmax())) for w, met_N in met.items() if met_N.any()},
        read_last=read_last,
    )
