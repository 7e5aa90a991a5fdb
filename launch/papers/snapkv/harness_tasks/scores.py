"""Scores of LongBench's tasks (arXiv 2308.14508, its evaluation code), between 0 and 1; an answer has the best of its references."""

import difflib
import functools
import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def f1(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Returns the words in common, without case, punctuation and articles: 2 p r / (p + r)."""
    del classes
    words, wanted = _words(text), _words(answer)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def rouge_l(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Returns the F measure of ROUGE-L by the package rouge_score, without stemming."""
    del classes
    return float(_rouge().score(answer, text)["rougeL"].fmeasure)


@functools.cache
def _rouge():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"])


def classification(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Returns 1 / n if the right class is among the n classes that the text names.

    Classes that are parts of the right one's name do not count.
    """
    named = [name for name in classes if name in text]
    named = [name for name in named if name == answer or name not in answer]
    return 1 / len(named) if answer in named else 0.0


def count(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Returns the share of the numbers in the text that are right."""
    del classes
    numbers = re.findall(r"\d+", text)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Returns the share of the numbers in the text that are the right paragraph's."""
    (number,) = re.findall(r"Paragraph (\d+)", answer)[:1]
    return count(text, number, classes)


def code_similarity(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Returns the similarity of the first line of code with the right one, in per cent without decimals, by difflib."""
    del classes
    lines = [line for line in text.lstrip("\n").split("\n") if not re.search(r"`|#|//", line)]
    first = lines[0] if lines else ""
    return round(100 * difflib.SequenceMatcher(None, first, answer).ratio()) / 100
