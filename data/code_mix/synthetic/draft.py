"""What a family of synthetic problems draws: a statement, a solution, and independently what is right."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Draft:
    """A problem before it is written down.

    Attributes:
      names: of the function, of which one is taken.
      parameters: of the function, as in the statement and the body.
      statement: what it does, as a sentence that begins with a verb.
      body: its lines, indented by 4 spaces in each level below the first.
      right: computes what it returns, in another way than the body.
      draw: arguments to try it on.
      kinds: annotations of the parameters and of what it returns.
      rename: names in the body -> others that say the same, of which one is taken.
    """

    names: Sequence[str]
    parameters: Sequence[str]
    statement: str
    body: str
    right: Callable[..., Any]
    draw: Callable[[random.Random], tuple]
    kinds: Sequence[str]
    rename: dict[str, Sequence[str]] = dataclasses.field(default_factory=dict)


Family = Callable[[random.Random], Draft]

LISTS = ("numbers", "values", "items", "xs", "data")
RESULTS = ("result", "out", "found", "answer")


def numbers(rng: random.Random, low: int = -9, high: int = 20, most: int = 8) -> list[int]:
    """A short list of numbers, at times an empty one."""
    return [rng.randint(low, high) for _ in range(rng.randint(0, most))]


def word(rng: random.Random, letters: str = "abcdeiou", most: int = 7) -> str:
    """A word of few letters, so that some come twice."""
    return "".join(rng.choices(letters, k=rng.randint(1, most)))


def sentence(rng: random.Random, most: int = 6) -> str:
    """Words with single spaces between them."""
    return " ".join(word(rng) for _ in range(rng.randint(1, most)))
