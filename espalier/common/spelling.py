"""Hints on misspelt names."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


def nearest(name: Any, valid: Iterable[Any]) -> str:
    """Returns `did you mean ...?` for an error message, or all valid names if none is similar."""
    names = [*map(str, valid)]
    text = name[:100] if isinstance(name, str) else reprlib.repr(name)  # may be of a file of others
    if close := difflib.get_close_matches(text, names, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"valid names are {', '.join(names)}" if names else "there are none"
