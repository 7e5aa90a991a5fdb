"""Commands as a shell reads them."""

import shlex
from collections.abc import Sequence


def command_line(words: Sequence[str]) -> str:
    """Returns words as a line for a shell; a word with single quotes is put into double quotes where these suffice."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)
