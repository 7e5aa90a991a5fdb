"""Commands in a sweep file: words in which names in braces stand for what is known when they are run."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_PLACE = re.compile(r"\{([A-Za-z0-9][A-Za-z0-9_-]*)\}")


def places(words: Iterable[str]) -> tuple[str, ...]:
    """The names in braces, each once, in the order of the words."""
    return tuple(dict.fromkeys(name for word in words for name in _PLACE.findall(word)))


def filled(words: Iterable[Any], values: Mapping[str, str]) -> tuple[str, ...]:
    """The words with their values for the names; names without one stay in their braces."""
    return tuple(
        _PLACE.sub(lambda found: values.get(found[1], found[0]), str(word)) for word in words
    )
