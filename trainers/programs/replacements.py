"""What to describe in place of values that a configuration determines when they are called."""

from collections.abc import Callable
from typing import Any

# Each returns what to describe in place of a value, or NotImplemented if it does not know the value.
REPLACEMENTS: list[Callable[[Any], Any]] = []


def replace_values(replacement: Callable[[Any], Any]) -> None:
    """Registers a function that returns what trainers/programs/description.py visits in place of a value, or NotImplemented."""
    if replacement not in REPLACEMENTS:
        REPLACEMENTS.append(replacement)
