"""What ends a row while its tokens are generated: a stop string in its text, or a function that sees its tokens."""

from collections.abc import Callable, Sequence

import numpy as np

# The replacement character, which decoders write for bytes that are not a complete character.
BROKEN = "\N{REPLACEMENT CHARACTER}"
# (prompt, sample, new tokens since the last call) -> number of these to keep if the row ends there, else None.
Watch = Callable[[int, int, Sequence[int]], int | None]


class GrowingText:
    """The text of one row of tokens, extended token by token, in whole characters, until a stop string.

    A token may be a part of a character, and a tokenizer may decode a token differently after another token (spaces
    between words). A few earlier tokens are therefore decoded together with the new ones, and text is returned only when
    it ends with a whole character. The vocabularies of this project decode an incomplete character as U+FFFD or as
    nothing; in both cases the text waits for further tokens.

    Args:
      decode: function that returns the text of token ids.
      stops: the text ends before the first occurrence of any of these strings, which must not be empty.
      begun: text with which the first token begins, and which is left out.

    Attributes:
      stopped: whether a stop string has occurred; later tokens are ignored.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        *,
        begun: str = "",
    ):
        if "" in stops:
            raise ValueError("A stop string is empty, so every text would end at once: omit it.")
        self._decode = decode
        self._stops = tuple(stops)
        self._begun = begun
        self._context = 0  # index of the first token to decode
        self._read = 0  # number of tokens whose text was returned or is in `_waiting`
        self._waiting = ""  # text that may be the start of a stop string
        self.tokens: list[int] = []
        self.stopped = False

    def add(self, token: int) -> str:
        """Adds a token; returns the new text that is final."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        old = self._decode(self.tokens[self._context : self._read])
        new = self._decode(self.tokens[self._context :])
        if len(new) <= len(old) or new.endswith(BROKEN):
            return ""
        self._context, self._read = self._read, len(self.tokens)
        return self._give(new[len(old) :])

    def finish(self) -> str:
        """Returns the rest of the text, after the last token."""
        if self.stopped:
            return ""
        old = self._decode(self.tokens[self._context : self._read])
        rest = self._give(self._decode(self.tokens[self._context :])[len(old) :])
        waiting, self._waiting = self._waiting, ""
        return rest if self.stopped else rest + waiting

    def _give(self, piece: str) -> str:
        piece, self._begun = piece.removeprefix(self._begun), ""
        text = self._waiting + piece
        before = cut(text, self._stops)
        if before is not None:
            self.stopped, self._waiting = True, ""
            return before
        final = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._waiting = text[final:]
        return text[:final]


def cut(text: str, stops: Sequence[str]) -> str | None:
    """Returns the text before the first stop string; None if no stop string occurs."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None


def _overlap(text: str, stop: str) -> int:
    """Returns the number of characters at the end of a text that are the start of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Watched:
    """Calls a watch with the new tokens of one batch, and records the rows that it has ended.

    Args:
      watch: called for every row that has new tokens; None does not end rows.
      batch: the index of each prompt. The `samples` rows of a prompt are adjacent; rows that fill the batch are last.
      samples: number of rows of each prompt.

    Attributes:
      lengths: number of tokens of each row that the watch has ended, by row.
    """

    def __init__(self, watch: Watch | None, batch: Sequence[int], samples: int):
        self._watch = watch
        self._rows = [(i, sample) for i in batch for sample in range(samples)]
        self._shown = [0] * len(self._rows)
        self.lengths: dict[int, int] = {}

    def look(self, tokens_RM: np.ndarray, counts_R: np.ndarray) -> np.ndarray:
        """Passes new tokens to the watch; returns whether each row has ended, [R]."""
        if self._watch is not None:
            for r, (i, sample) in enumerate(self._rows):
                shown, count = self._shown[r], int(counts_R[r])
                if r in self.lengths or shown == count:
                    continue
                keep = self._watch(i, sample, tokens_RM[r, shown:count].tolist())
                self._shown[r] = count
                if keep is not None:
                    self.lengths[r] = shown + keep
        return np.isin(np.arange(len(counts_R)), list(self.lengths))
