"""Names in messages: hints on misspelt ones, and the first of many."""

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


def few(names: Iterable[str], most: int) -> str:
    """Returns the first `most` different names and the number of the others, such as 'a, b and 3 more'."""
    shown = list(dict.fromkeys(names))
    rest = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + rest
