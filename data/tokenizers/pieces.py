"""The pieces of a vocabulary as it spells them, and which of them begin with the text of another.

Spellings show what a decoder may hide, such as a space before a word: SentencePiece writes it as U+2581, byte-level BPE
as U+0120. One piece's text begins with another's exactly if its spelling does.
"""

import re
from collections.abc import Mapping
from typing import Any

# A byte that SentencePiece spells as a number; it is no text of its own.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# What decoders write for bytes that are not a complete character.
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Pieces:
    """The pieces of a SeqIO vocabulary.

    Special tokens, sentinels and tokens added to a Hugging Face tokenizer are not among them, and vocabularies of bytes or
    characters have none.
    """

    def __init__(self, vocabulary: Any):
        self._vocabulary = vocabulary
        self._spellings = spelled(vocabulary)
        self._beginning: dict[int, tuple[int, ...]] = {}

    def beginning_with(self, token: int) -> tuple[int, ...]:
        """Returns the ids of the pieces that begin with the text of a token, itself included.

        Empty if the token is no piece, or ends within a character.
        """
        if token not in self._beginning:
            text = self._spellings.get(token)
            ids: tuple[int, ...] = ()
            if text is not None and _BROKEN not in self._vocabulary.decode([token]):
                ids = tuple(id for id, other in self._spellings.items() if other.startswith(text))
            self._beginning[token] = ids
        return self._beginning[token]


def spelled(vocabulary: Any) -> Mapping[int, str]:
    """Returns {id: spelling} of the pieces; empty for vocabularies of bytes or characters."""
    if hasattr(vocabulary, "spellings"):  # of Hugging Face
        spellings = vocabulary.spellings
    elif (model := getattr(vocabulary, "tokenizer", None)) is not None:  # SeqIO's SentencePiece
        spellings = {
            id: model.IdToPiece(id)
            for id in range(vocabulary.vocab_size - vocabulary.extra_ids)
            if not (model.IsControl(id) or model.IsUnknown(id) or model.IsUnused(id))
        }
    else:
        return {}
    return {id: text for id, text in spellings.items() if not _BYTE.fullmatch(text)}
