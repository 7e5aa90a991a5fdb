"""Counts of events while reading, with the place of the first."""

from collections.abc import Mapping
from typing import Any


class Tally:
    """Counts by reason.

    Attributes:
      found: reason -> {'rows': how many, 'first': where the first one is}.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, reason: str, where: str) -> None:
        self.found.setdefault(reason, {"rows": 0, "first": where})["rows"] += 1

    def __str__(self) -> str:
        return listed(self.found)


def listed(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Counts as text."""
    return ", ".join(
        f"{count['rows']:,} {reason} (first: {count['first']})" for reason, count in found.items()
    )
