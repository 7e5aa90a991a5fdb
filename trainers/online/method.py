"""What methods that learn from their own samples make of them. Shapes: P prompts, G samples of each, R = P G."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from trainers.inputs import Inputs
from trainers.online.rows import Arrays

# What a forward pass over sampled rows can tell, float32 [B, L] each.
LOG_PROBS, REFERENCE, VALUES = "log_probs", "reference_log_probs", "values"
Score = Callable[[Mapping[str, np.ndarray]], Arrays]


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a policy wrote, and what that is worth.

    Attributes:
      prompts: P, with what is read before each.
      completions: R, with the token that ended each, those of a prompt side by side.
      rewards_PG: float32.
      ended_PG: which ended by themselves.
      sources_P: index of each prompt's source.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    rewards_PG: np.ndarray
    ended_PG: np.ndarray
    sources_P: np.ndarray


class Method(Inputs, Protocol):
    """The inputs of a run that samples, and how they are made of samples.

    Attributes:
      prompt_length: tokens of a prompt at most, with what is read before it.
      completion_length: tokens of a completion at most, with the one that ends it.
      samples: G.
      rows_per_prompt: rows of a batch.
      updates: that each rollout is used for, all of it in each.
      asks: which of LOG_PROBS, REFERENCE and VALUES the score must tell.
    """

    prompt_length: int
    completion_length: int

    @property
    def samples(self) -> int: ...
    @property
    def rows_per_prompt(self) -> int: ...
    @property
    def updates(self) -> int: ...
    @property
    def asks(self) -> frozenset[str]: ...

    def batch(self, samples: Samples, score: Score) -> Arrays:
        """The arrays that `Inputs.arrays` says.

        Args:
          samples: of one rollout.
          score: what models say of the tokens of rows, which are given by their columns.
        """
        ...


def check_sizes(**sizes: int) -> None:
    """ValueError for a size that is not positive."""
    bad = [f"{name} = {size}" for name, size in sizes.items() if size < 1]
    if bad:
        raise ValueError(f"{', '.join(bad)}: give 1 or more.")


def row_length(prompt_length: int, completion_length: int) -> int:
    """Places of a prompt with a completion, of which the last token is not read."""
    return prompt_length + completion_length - 1
