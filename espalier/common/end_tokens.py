"""The tokens of a SeqIO vocabulary that end a text."""

from typing import Any


def eos_ids(vocabulary: Any) -> tuple[int, ...]:
    """Returns the tokens that end a text in a SeqIO vocabulary, which may have several; empty without EOS."""
    ids = getattr(vocabulary, "eos_ids", None) or (getattr(vocabulary, "eos_id", None),)
    return tuple(id for id in ids if id not in (None, -1))


def read_ends(vocabulary: Any) -> tuple[int, ...]:
    """Returns all tokens that end a text, the one that a reward model reads first: EOS, if the vocabulary has it.

    A reward model reads a completion that ended at this token, whichever token ended it, in training and in every scorer.
    """
    ids = (getattr(vocabulary, "eos_id", None), *eos_ids(vocabulary))
    return tuple(dict.fromkeys(id for id in ids if id not in (None, -1)))
