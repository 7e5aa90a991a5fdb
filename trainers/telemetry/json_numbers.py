"""The kinds of numbers in files that Python reads back: JSON's have any number of digits."""

import sys
from typing import Any


def is_count(value: Any) -> bool:
    """Returns whether a JSON value is a whole number from 0 on that a float holds exactly."""
    return type(value) is int and 0 <= value < 2**53


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a number (NaN and infinities included) that a float holds."""
    if isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)
