"""Token healing: a prompt's last token is drawn anew, together with the text that follows it.

A tokenizer writes `def main` as `def`, ` main`, but the prompt `def ` as `def`, ` `, after which a model has never seen
a word. So the last token is dropped, and the first new token is chosen among the pieces that begin with its text. Text is
then drawn exactly as the model would go on from the other tokens, on the condition that it begins with the text of the
dropped token, if only these pieces can begin so; other ways to write the dropped text, in several shorter pieces, are left
out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from espalier.data.tokenizers.pieces import Pieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class Healed:
    """A prompt to continue.

    Attributes:
      tokens: the prompt, without its last token if that is drawn anew.
      first: the tokens among which the first new token is chosen; None for all.
      text: the text with which the new tokens begin, and which is the prompt's.
    """

    tokens: Sequence[int]
    first: Sequence[int] | None = None
    text: str = ""


class TokenHealing:
    """Heals prompts of a SeqIO vocabulary; vocabularies of bytes and characters need none."""

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
