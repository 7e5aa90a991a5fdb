"""Counts of events during reading, with the place of the first event."""

from typing import Any


class Tally(dict[str, dict[str, Any]]):
    """Reason -> {'rows': number of rows, 'first': place of the first one}."""

    def add(self, reason: str, where: str) -> None:
        self.setdefault(reason, {"rows": 0, "first": where})["rows"] += 1

    def __str__(self) -> str:
        return ", ".join(
            f"{x['rows']:,} {reason} (first: {x['first']})" for reason, x in self.items()
        )
