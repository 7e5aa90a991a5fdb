"""Predictions of next tokens, carried from a teacher's vocabulary to a student's by the text of tokens.

Both vocabularies tokenise one completion. A token of the student is taught if the teacher has a token with the same beginning
and end in the text; the end of the completion is a token too. There, a stored token of the teacher gives its probability to the
student's token of the same text, and its ends of a turn to the student's. The probability of all other tokens of the teacher is
that of any other token of the student.

What is approximate: an alternative that the teacher would write in several tokens, and the student in one, has the probability of
its first token, which is of more texts. Where the two divide the completion itself in different places, nothing is taught. Universal
logit distillation (arXiv 2402.12030) instead compares sorted probabilities, whatever their tokens, and approximate likelihood
matching (arXiv 2503.20083) the probability of each common stretch of text, without alternatives. Equal texts are what TRL's GOLD
compares first. With equal vocabularies nothing is approximate, and nothing is carried (`carried` with every id for itself is the
identity).

Shapes: T positions, K stored tokens, V ids of the teacher.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.data.tokenizers import pieces

_WINDOW = 8  # tokens that are decoded before a token, for its text
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders write for a part of a character

# Beginning of a token in a text -> (its place, its end; None within a character). At the end of a text that has no more tokens,
# (number of tokens, END).
Places = Mapping[int, tuple[int, int | None]]
END = -1


def texts_of(vocabulary: Any) -> dict[int, str]:
    """Returns id -> text within a text, without control tokens, spelled bytes, and tokens that end within a character."""
    ids = pieces.spelled(vocabulary) or range(vocabulary.vocab_size)
    special = {vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id}
    first = list(vocabulary.encode("a"))  # decoders may drop a space at the beginning of a text
    before = vocabulary.decode(first)
    texts = {}
    for id in ids:
        text = vocabulary.decode([*first, id])
        if id not in special and text.startswith(before) and _BROKEN not in text:
            texts[id] = text[len(before) :]
    return {id: text for id, text in texts.items() if text}


def same_texts(teacher: Any, student: Any, size: int) -> np.ndarray:
    """Returns the student's id with the text of each id of the teacher, int32 [size]; -1 for none."""
    ids = {text: id for id, text in texts_of(student).items()}
    same_V = np.full(size, -1, np.int32)
    for id, text in texts_of(teacher).items():
        same_V[id] = ids.get(text, -1)
    return same_V


def places_of(vocabulary: Any, ids: Sequence[int]) -> tuple[str, Places]:
    """Returns the text of a completion, and where its tokens begin; tokens that begin within a character are absent."""
    places: dict[int, tuple[int, int | None]] = {}
    text, begin, start, before = "", 0, 0, ""
    whole = True  # whether the last token ended with a character
    for i in range(len(ids)):
        if whole and i - start > 2 * _WINDOW:
            start = i - _WINDOW
            before = vocabulary.decode(ids[start:i])
        after = vocabulary.decode(ids[start : i + 1])
        added = after[len(before) :] if after.startswith(before) else ""
        began, whole = whole, bool(added) and _BROKEN not in added
        if whole:
            text, before = text + added, after
        if began:
            places[begin] = i, len(text) if whole else None
        begin = len(text)
    if whole:
        places[begin] = len(ids), END
    return text, places


def matches(teacher: tuple[str, Places], student: tuple[str, Places]) -> dict[int, int]:
    """Returns place in the student's completion -> place in the teacher's, of the tokens of the same text.

    The end of the teacher's is matched with the student's next token, which ends the turn. The texts may differ in white space at
    their beginnings and ends, which templates remove, and the student's may be cut.

    Args:
      teacher, student: of `places_of`; the teacher's tokens without those that end the turn.
    """
    (taught, theirs), (text, own) = teacher, student
    shift = _margin(taught) - _margin(text)
    inner = taught.strip()
    if not (text.lstrip().startswith(inner) or inner.startswith(text.strip())):
        return {}
    result = {}
    for begin, (place, end) in own.items():
        their_place, their_end = theirs.get(begin + shift, (-1, None))
        same = end is not None and their_end == end + shift
        if end != END and (their_end == END or same):
            result[place] = their_place
    return result


def _margin(text: str) -> int:
    return len(text) - len(text.lstrip())


def carried(values_TN: np.ndarray, same_V: np.ndarray, *, absent: float) -> np.ndarray:
    """Returns stored values with the student's ids, float32 [T, 2 K + 1]; an id of -1 is no token.

    Args:
      values_TN: the teacher's, as `taught_stream.shape_of` has them: K ids, K log-probabilities, and that of all others.
      same_V: the student's id of each id; -1 for none.
      absent: log-probability of no token.
    """
    top_k = (values_TN.shape[1] - 1) // 2
    ids_TK = same_V[values_TN[:, :top_k].astype(np.int64)]
    log_p_TN = values_TN[:, top_k:].astype(np.float64)
    made = np.empty(values_TN.shape, np.float32)
    for t, (ids_K, log_p_N) in enumerate(zip(ids_TK, log_p_TN, strict=True)):
        p: dict[int, list[float]] = {}
        for id, log_p in zip([*ids_K.tolist(), -1], log_p_N.tolist(), strict=True):
            p.setdefault(id, []).append(log_p)
        others = max(np.logaddexp.reduce(p.pop(-1)), absent)
        ids = [*p, *[-1] * (top_k - len(p))]
        log_ps = [*map(np.logaddexp.reduce, p.values()), *[absent] * (top_k - len(p))]
        made[t] = [*ids, *log_ps, others]
    return made


def nothing(length: int, top_k: int, *, absent: float) -> np.ndarray:
    """Returns the values of positions that are not taught: all tokens are one outcome, whose divergence is 0."""
    values_TN = np.full((length, 2 * top_k + 1), absent, np.float32)
    values_TN[:, :top_k] = -1
    values_TN[:, -1] = 0
    return values_TN
