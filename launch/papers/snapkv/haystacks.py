"""Haystacks: stretches of the King James Bible with five sentences "The magic number of <adjective noun> is <5 digits>."."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.text.sources import english, environment

ADJECTIVES = ("amber", "silent", "crooked", "frozen", "golden", "hollow", "rusty", "velvet")
NOUNS = ("falcon", "lantern", "harbor", "anvil", "orchard", "saddle", "teapot", "violin")
DIGITS = 5
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
MIDDLE = 2  # the needle with two questions, in two wordings


@dataclasses.dataclass(frozen=True)
class Haystack:
    """A text and its needles.

    Attributes:
      text: needles included.
      names, numbers: of the needles, in the order of DEPTHS.
    """

    text: str
    names: tuple[str, ...]
    numbers: tuple[str, ...]

    def questions(self) -> list[str]:
        """Returns one for each needle, and then the middle one in other words."""
        asked = [f"What is the magic number of {n}? Answer with the number." for n in self.names]
        again = f"Tell me the magic number of {self.names[MIDDLE]}. I only need the number."
        return [*asked, again]

    def opening(self, needle: int) -> str:
        """Returns the beginning of the answer, after which a small model writes the number alone."""
        return f"The magic number of {self.names[needle]} is"


def paragraphs() -> list[str]:
    """Returns the paragraphs of a long public text in an installed package, in order.

    Raises:
      ValueError: the package is not installed.
    """
    env = environment.Environment.current()
    books = [c for c in english.candidates(env) if c.id.startswith("english/kjv/")]
    if not books:
        raise ValueError(f"The haystack is text of {english.BIBLE}, which is not installed.")
    return [line for book in books for line in book.read().split("\n\n")[1:]]


def haystack(rng: np.random.Generator, lines: Sequence[str], count: Any, tokens: int) -> Haystack:
    """Returns a stretch of consecutive paragraphs of at most `tokens` tokens, needles included.

    Args:
      rng: chooses the place, names and numbers.
      lines: paragraphs to choose from.
      count: number of tokens of a text.
      tokens: the most there may be.
    """
    words = (rng.permutation(kind)[: len(DEPTHS)] for kind in (ADJECTIVES, NOUNS))
    chosen = tuple(" ".join(pair) for pair in zip(*words, strict=True))
    numbers = tuple(str(n) for n in rng.integers(10 ** (DIGITS - 1), 10**DIGITS, len(DEPTHS)))
    needles = [f"The magic number of {a} is {b}." for a, b in zip(chosen, numbers, strict=True)]
    budget = tokens - count("\n".join(needles))
    start = int(rng.integers(len(lines) - tokens))
    sentences: list[str] = []
    following = (s for line in lines[start:] for s in re.split(r"(?<=[.;:?!]) ", line))
    for sentence in following:
        if (used := count(sentence) + 1) > budget:
            break
        sentences.append(sentence)
        budget -= used
    places = [round(depth * len(sentences)) for depth in DEPTHS]
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        sentences.insert(place, needle)
    return Haystack(" ".join(sentences), chosen, numbers)


def right_digits(answer: str, number: str) -> list[int]:
    """Returns 1 for each digit of the number that the answer's first number has in the same place."""
    match = re.search(r"\d+", answer)
    answered = match.group() if match else ""
    same = [int(a == b) for a, b in zip(answered.ljust(len(number)), number, strict=False)]
    # A longer number is another number: its last digit counts as wrong.
    return [*same[:-1], same[-1] if len(answered) == len(number) else 0]
