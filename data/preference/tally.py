"""Counts of events during reading, with the place of the first event."""

from collections.abc import Mapping
from typing import Any


class Tally:
    """Counts by reason.

    Attributes:
      found: reason -> {'rows': number of rows, 'first': place of the first one}.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, reason: str, where: str) -> None:
        self.found.setdefault(reason, {"rows": 0, "first": where})["rows"] += 1

    def __str__(self) -> str:
        return listed(self.found)


def listed(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the counts of a Tally as text."""
    return ", ".join(
        f"{count['rows']:,} {reason} (first: {count['first']})" for reason, count in found.items()
    )
