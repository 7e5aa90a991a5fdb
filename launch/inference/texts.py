"""The texts of prompts, whose last token can be drawn again, and of continuations.

Continuations are decoded while they are generated, searched for stops, made rows of a file, and compared with those of the
full cache.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from espalier.data.tokenizers.pieces import Pieces
from espalier.trainers.decoding.decoder import Continuation
from espalier.trainers.decoding.stop_strings import GrowingText, cut

PROMPT_KEYS = ("text", "messages", "tokens")  # of a row: the one that is there is its prompt


class Texts:
    """The texts of continuations: decodes them while they are generated, finds stops, and makes rows of a file.

    Args:
      decode: decodes tokens; None for a run without a vocabulary, whose rows have no text.
      ends: ids that end a continuation; they are among its tokens but not in its text.
      stops: texts that end a continuation; its text is cut before the stop, its tokens after the token that completes
        the stop.
      show: called with text as soon as it is final; None to wait for the end.
      decode_watched: decodes tokens to search for stops; None for `decode`.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str] | None,
        *,
        ends: Collection[int],
        stops: Sequence[str] = (),
        show: Callable[[str], None] | None = None,
        decode_watched: Callable[..., str] | None = None,
    ):
        self._decode = decode
        self._ends = frozenset(ends)
        self._stops = tuple(stops)
        self._show = show
        self._decode_watched = decode_watched or decode
        self.begin({})

    def begin(self, begun: Mapping[int, str]) -> None:
        """Forgets earlier prompts; `begun`: by prompt, its text with which its continuation begins, which is left out."""
        self._growing: dict[tuple[int, int], GrowingText] = {}
        self._begun = begun

    @property
    def watching(self) -> bool:
        """Whether `watch` must be called during generation."""
        return bool(self._stops) or self._show is not None

    def watch(self, prompt: int, sample: int, tokens: Sequence[int]) -> int | None:
        """Returns the number of new tokens after which a row stops, or None; see trainers/decoding/stop_strings.py."""
        if not self.watching:
            return None
        text = self._growing.get((prompt, sample))
        if text is None:
            assert self._decode_watched is not None  # stops and texts to show are decoded
            text = GrowingText(self._decode_watched, self._stops, begun=self._begun.get(prompt, ""))
            self._growing[prompt, sample] = text
        for count, token in enumerate(tokens, 1):
            if token in self._ends:
                return None
            self._show_piece(text.add(token))
            if text.stopped:
                return count
        return None

    def _show_piece(self, piece: str) -> None:
        if piece and self._show is not None:
            self._show(piece)

    def text(self, tokens: Sequence[int], *, prompt: int = 0) -> tuple[str, str]:
        """Returns the text of a continuation up to its end, and the kind of end: "eos", "stop" or "length"."""
        ended = bool(tokens) and tokens[-1] in self._ends
        text = self._decode(tokens[:-1] if ended else tokens) if self._decode else ""
        text = text.removeprefix(self._begun.get(prompt, ""))
        before_stop = cut(text, self._stops)
        if before_stop is not None:
            return before_stop, "stop"
        return text, "eos" if ended else "length"

    def answer(
        self, row: Mapping[str, Any], prompt: int, sample: int, new: Continuation
    ) -> dict[str, Any]:
        """Returns a row with one of its continuations."""
        growing = self._growing.pop((prompt, sample), None)
        if growing is not None:
            self._show_piece(growing.finish())
        answer = {key: value for key, value in row.items() if key not in PROMPT_KEYS}
        answer["prompt"] = next(row[key] for key in PROMPT_KEYS if key in row)
        answer["sample"] = sample
        text, answer["ended"] = self.text(new.tokens, prompt=prompt)
        if self._decode is not None:
            answer["text"] = text
        answer |= {"tokens": new.tokens, "logprobs": new.log_probs}
        if new.score is not None:
            answer["score"] = new.score
        return answer


def decoder_of(vocabulary: Any) -> Callable[[Sequence[int]], str]:
    """Returns a function that decodes all tokens; SeqIO's `decode` would stop at the first EOS."""

    def decode(tokens: Sequence[int]) -> str:
        parts: list[list[int]] = [[]]
        for token in tokens:
            if token == vocabulary.eos_id:
                parts.append([])
            else:
                parts[-1].append(token)
        return "".join(vocabulary.decode(part) for part in parts)

    return decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Healed:
    """A prompt to continue.

    Attributes:
      tokens: the prompt, without its last token if that is drawn again.
      first: the tokens among which the first new token is chosen; None for all.
      text: the text with which the new tokens begin, and which is the prompt's.
    """

    tokens: Sequence[int]
    first: Sequence[int] | None = None
    text: str = ""


class TokenHealing:
    """Token healing: a prompt's last token is drawn again, together with the text that follows it.

    A tokenizer writes `def main` as `def`, ` main`, but the prompt `def ` as `def`, ` `, after which a model has never seen
    a word. So the last token is dropped, and the first new token is chosen among the pieces that begin with its text. Text is
    then drawn exactly as the model would continue the other tokens, on the condition that it begins with the text of the
    dropped token, if only these pieces can begin so; other ways to write the dropped text, in several shorter pieces, are left
    out.

    Args:
      vocabulary: of SeqIO; vocabularies of bytes and characters need no healing.
    """

    def __init__(self, vocabulary: Any):
        self._vocabulary = vocabulary
        self._pieces = Pieces(vocabulary)

    def __call__(self, prompt: Sequence[int]) -> Healed:
        """Returns the prompt of a text without its last token if a longer piece begins with that token's text."""
        first = self._pieces.beginning_with(prompt[-1])
        if len(first) < 2 or len(prompt) < 2:
            return Healed(tokens=prompt)
        text = self._vocabulary.decode([prompt[-1]])
        return Healed(tokens=prompt[:-1], first=first, text=text)


@dataclasses.dataclass
class Agreement:
    """Counts of continuations that equal the full cache's.

    Attributes:
      rows: number of continuations.
      equal: number of continuations whose tokens are all equal.
      same_tokens: of each continuation that differs, the number of tokens before the first difference.
    """

    rows: int = 0
    equal: int = 0
    same_tokens: list[int] = dataclasses.field(default_factory=list)

    def add(self, tokens: Sequence[int], full: Sequence[int]) -> int:
        """Counts a continuation; returns the number of its tokens before the first difference."""
        same = next(
            (i for i, (one, other) in enumerate(zip(tokens, full, strict=False)) if one != other),
            min(len(tokens), len(full)),
        )
        self.rows += 1
        if same == len(tokens) == len(full):
            self.equal += 1
        else:
            self.same_tokens.append(same)
        return same

    def __str__(self) -> str:
        text = f"{self.equal:,} of {self.rows:,} continuations equal the full cache's"
        if not self.same_tokens:
            return text
        mean = sum(self.same_tokens) / len(self.same_tokens)
        others = "the others" if self.equal else "all"
        return f"{text}; {others} differ after {mean:,.1f} tokens on average"


def compared(
    rows: Iterable[dict[str, Any]], full: Iterable[Mapping[str, Any]], agreement: Agreement
) -> Iterator[dict[str, Any]]:
    """Yields rows with the full cache's continuation as "full", and "same_tokens" before the first difference."""
    for row, other in zip(rows, full, strict=True):
        same = agreement.add(row["tokens"], other["tokens"])
        shown = {key: other[key] for key in ("text", "tokens", "ended") if key in other}
        yield {**row, "full": shown, "same_tokens": same}
