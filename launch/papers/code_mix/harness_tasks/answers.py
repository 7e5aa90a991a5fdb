"""Whether a text is one of the answers to a question."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and surplus spaces, as SQuAD's metric has it.

    (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1.)
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text is one of the answers but for their normalisation."""
    return float(_compared(text) in {_compared(answer) for answer in answers})


def _compared(text: str) -> str:
    # An answer that is an article alone ("The") must not equal an empty one.
    return normalised(text) or text.strip().lower()


def f1(text: str, answers: Sequence[str]) -> float:
    """The most that words of the text and of one answer have in common: 2 p r / (p + r)."""
    return max((_f1(normalised(text).split(), normalised(a).split()) for a in answers), default=0.0)


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:  # nothing is right only where nothing is asked for
        return float(words == gold)
    common = sum((Counter(words) & Counter(gold)).values())
    return 2 * common / (len(words) + len(gold))
