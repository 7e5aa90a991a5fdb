"""Text of tokens as they come: whole characters only, and where a stop string ends it."""

from collections.abc import Callable, Sequence

# What a decoder writes for bytes that are no character, or no whole one yet.
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class GrowingText:
    """The text of one row of tokens, extended token by token.

    Tokens may hold parts of characters, and a tokenizer may write a token differently after another one
    (spaces between words). So a few earlier tokens are decoded along with the new ones, and text is
    returned only when it ends with a whole character. The decoding functions of this project's
    vocabularies write broken characters as U+FFFD or leave them out; both are waited for.

    Args:
      decode: text of token ids.
      stops: the text ends before the first of these strings, whichever comes first; none may be empty.

    Attributes:
      tokens: so far.
      stopped: whether a stop string has occurred; later tokens are ignored.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        if "" in stops:
            raise ValueError("A stop string is empty, so that every text would end at once.")
        self._decode = decode
        self._stops = tuple(stops)
        self._context = 0  # tokens from here on are decoded
        self._read = 0  # tokens before this have had their text returned or held
        self._held = ""  # text that may be the beginning of a stop string
        self.tokens: list[int] = []
        self.stopped = False

    def add(self, token: int) -> str:
        """Adds a token; returns the text that is certain by now and was not before."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        old = self._decode(self.tokens[self._context : self._read])
        new = self._decode(self.tokens[self._context :])
        if len(new) <= len(old) or new.endswith(_BROKEN):
            return ""
        self._context, self._read = self._read, len(self.tokens)
        return self._give(new[len(old) :])

    def finish(self) -> str:
        """The rest of the text, when no token will follow."""
        if self.stopped:
            return ""
        old = self._decode(self.tokens[self._context : self._read])
        rest = self._give(self._decode(self.tokens[self._context :])[len(old) :])
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _give(self, piece: str) -> str:
        text = self._held + piece
        before = cut(text, self._stops)
        if before is not None:
            self.stopped, self._held = True, ""
            return before
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def cut(text: str, stops: Sequence[str]) -> str | None:
    """Returns the text before the first stop string; None without one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that are the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
