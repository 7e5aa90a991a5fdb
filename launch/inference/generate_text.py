"""Texts of continuations: as they grow, where they stop, and as rows of a file."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from trainers.decoding.decoder import Continuation
from trainers.decoding.stop_strings import GrowingText, cut

_PROMPT_KEYS = ("text", "messages", "tokens")


class Texts:
    """The texts of one command's continuations.

    Args:
      decode: text of tokens; None for a run without a vocabulary, whose rows have none.
      ends: ids that end a continuation; they are among its tokens, not in its text.
      stops: texts that end one; text is cut before them, tokens are kept to the one that completes it.
      show: called with text as soon as it is certain; None to wait for the end.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str] | None,
        *,
        ends: Collection[int],
        stops: Sequence[str] = (),
        show: Callable[[str], None] | None = None,
    ):
        self._decode = decode
        self._ends = frozenset(ends)
        self._stops = tuple(stops)
        self._show = show
        self._growing: dict[tuple[int, int], GrowingText] = {}

    @property
    def watching(self) -> bool:
        """Whether tokens must be seen while there may be more."""
        return bool(self._stops) or self._show is not None

    def watch(self, prompt: int, sample: int, tokens: Sequence[int]) -> int | None:
        """See `Watch` in trainers/decoding/decoder.py."""
        text = self._growing.get((prompt, sample))
        if text is None:
            text = self._growing[prompt, sample] = GrowingText(self._decode, self._stops)
        for count, token in enumerate(tokens, 1):
            if token in self._ends:
                return None
            self._give(text.add(token))
            if text.stopped:
                return count
        return None

    def _give(self, piece: str) -> None:
        if piece and self._show is not None:
            self._show(piece)

    def answer(
        self, row: Mapping[str, Any], prompt: int, sample: int, new: Continuation
    ) -> dict[str, Any]:
        """A row with one of its continuations."""
        text = self._growing.pop((prompt, sample), None)
        if text is not None:
            self._give(text.finish())
        others = {key: value for key, value in row.items() if key not in _PROMPT_KEYS}
        given = next(row[key] for key in _PROMPT_KEYS if key in row)
        answer = {**others, "prompt": given, "sample": sample}
        ended = bool(new.tokens) and new.tokens[-1] in self._ends
        answer["ended"] = "eos" if ended else "length"
        if self._decode is not None:
            whole = self._decode(new.tokens[:-1] if ended else new.tokens)
            before = cut(whole, self._stops)
            if before is not None:
                whole, answer["ended"] = before, "stop"
            answer["text"] = whole
        answer |= {"tokens": new.tokens, "logprobs": new.log_probs}
        if new.score is not None:
            answer["score"] = new.score
        return answer


def decoder_of(vocabulary: Any) -> Callable[[Sequence[int]], str]:
    """The text of all tokens; SeqIO's `decode` stops at EOS, which does not end every continuation."""

    def decode(tokens: Sequence[int]) -> str:
        parts: list[list[int]] = [[]]
        for token in tokens:
            if token == vocabulary.eos_id:
                parts.append([])
            else:
                parts[-1].append(token)
        return "".join(vocabulary.decode(part) for part in parts)

    return decode


def to_terminal(piece: str) -> None:
    """Prints text at once; what the terminal's encoding lacks as an escape."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(piece.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()
