"""Compares the continuations of a cache policy with the full cache's."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass
class Agreement:
    """Counts of continuations that equal the full cache's.

    Attributes:
      rows: number of continuations.
      equal: number of continuations whose tokens are all equal.
      same_tokens: of each continuation that differs, the number of tokens before the first difference.
    """

    rows: int = 0
    equal: int = 0
    same_tokens: list[int] = dataclasses.field(default_factory=list)

    def add(self, tokens: Sequence[int], full: Sequence[int]) -> int:
        """Counts a continuation; returns the number of its tokens before the first difference."""
        same = next(
            (i for i, (one, other) in enumerate(zip(tokens, full, strict=False)) if one != other),
            min(len(tokens), len(full)),
        )
        self.rows += 1
        if same == len(tokens) == len(full):
            self.equal += 1
        else:
            self.same_tokens.append(same)
        return same

    def __str__(self) -> str:
        text = f"{self.equal:,} of {self.rows:,} continuations equal the full cache's"
        if not self.same_tokens:
            return text
        mean = sum(self.same_tokens) / len(self.same_tokens)
        others = "the others" if self.equal else "all"
        return f"{text}; {others} differ after {mean:,.1f} tokens on average"


def compared(
    rows: Iterable[dict[str, Any]], full: Iterable[Mapping[str, Any]], agreement: Agreement
) -> Iterator[dict[str, Any]]:
    """Yields rows with the full cache's continuation as "full", and "same_tokens" before the first difference."""
    for row, other in zip(rows, full, strict=True):
        same = agreement.add(row["tokens"], other["tokens"])
        shown = {key: other[key] for key in ("text", "tokens", "ended") if key in other}
        yield {**row, "full": shown, "same_tokens": same}
