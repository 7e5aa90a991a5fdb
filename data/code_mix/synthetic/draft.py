"""Drafts of synthetic problems: a statement, a solution, and a second computation of the right results."""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Names that replace another one; `render` chooses one of them.
LISTS = "numbers values items xs data"
RESULTS = "result out found answer"


def numbers(rng: random.Random, low: int = -9, high: int = 20, most: int = 8) -> list[int]:
    """Returns a list of 0 to `most` random integers in [low, high]."""
    return [rng.randint(low, high) for _ in range(rng.randint(0, most))]


def word(rng: random.Random, letters: str = "abcdeiou", most: int = 7) -> str:
    """Returns a word from few letters, so that letters repeat."""
    return "".join(rng.choices(letters, k=rng.randint(1, most)))


def sentence(rng: random.Random, most: int = 6) -> str:
    """Returns 1 to `most` words with single spaces between them."""
    return " ".join(word(rng) for _ in range(rng.randint(1, most)))


@dataclasses.dataclass(frozen=True)
class Draft:
    """A problem before it is written down; by default, from a list of integers to another one.

    Attributes:
      names: possible names of the function; `render` chooses one.
      statement: what the function does, as a sentence that begins with a verb.
      body: lines of the function, indented by 4 spaces in each level below the first.
      right: computes the return value in another way than the body.
      rename: name in the body -> possible replacements, separated by spaces.
      parameters: parameter names of the function, as in the statement and the body.
      draw: draws arguments for a test.
      kinds: annotations of the parameters, then of the return value.
    """

    names: Sequence[str]
    statement: str
    body: str
    right: Callable[..., Any]
    rename: Mapping[str, str]
    parameters: Sequence[str] = ("numbers",)
    draw: Callable[[random.Random], tuple] = lambda rng: (numbers(rng),)
    kinds: Sequence[str] = ("list[int]", "list[int]")


Family = Callable[[random.Random], Draft]
