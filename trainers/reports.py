"""The report seam: lines about a model, shown at the start of a run before anything is allocated."""

from collections.abc import Callable, Sequence
from typing import Any

# Called with the parameters' shapes; raises ValueError if the method does not accept the model.
Report = Callable[[Any], Sequence[str]]


def named(**slots: Report | None) -> tuple[Report, ...]:
    """Returns the reports in the order of their slots' names, without slots that are None."""
    return tuple(report for _, report in sorted(slots.items()) if report is not None)
