"""The base class of methods that train on their own samples: it arranges completions into rows of a batch.

Shapes: P prompts, G samples of each, R = P G completions, B rows, L length.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from espalier.common.ranges import Size
from espalier.model.rows import TOKENS, RowKind
from espalier.trainers import inputs

# What a forward pass over rows can compute, float32 [B, L] each.
LOG_PROBS, REFERENCE, VALUES = "log_probs", "reference_log_probs", "values"
Arrays = dict[str, np.ndarray]
Score = Callable[[Mapping[str, np.ndarray]], Arrays]


@dataclasses.dataclass(frozen=True)
class Samples:
    """One rollout: completions of prompts, with their rewards.

    Attributes:
      prompts: token ids of P prompts, each including the start token.
      completions: token ids of R completions, each including its end token; the G completions of a prompt are adjacent.
      rewards_PG: float32.
      ended_PG: whether a completion ended with an end token, not at the maximum length.
      sources_P: index of each prompt's source.
      info_P: columns of each prompt's row in the files.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    rewards_PG: np.ndarray
    ended_PG: np.ndarray
    sources_P: np.ndarray
    info_P: Sequence[Mapping[str, Any]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(inputs.TokenRows):
    """The `trainers.inputs.Inputs` of a run that trains on its own samples.

    Subclasses define `scores`, `columns` and `batch`.

    Attributes:
      prompt_length: maximum tokens of a prompt, including the start token.
      completion_length: maximum tokens of a completion, including its end token.
      samples: G, completions of each prompt.
      updates: number of updates on each rollout; every update uses the whole rollout.
      row: the kind of row that the policy reads. An encoder-decoder encodes prompts without their start token, which its
        targets follow.
    """

    prompt_length: Size
    completion_length: Size
    samples: Size = 1
    updates: Size = 1
    row: RowKind = dataclasses.field(default=TOKENS, init=False)
    texts_per_row: ClassVar[int] = 1

    def __post_init__(self):
        names = ("prompt_length", "completion_length", "samples", "updates")
        bad = [f"{name} = {getattr(self, name)}" for name in names if getattr(self, name) < 1]
        if bad:
            raise ValueError(f"{', '.join(bad)}: give 1 or more.")

    @property
    def rows_per_prompt(self) -> int:
        """Number of rows of a batch for each prompt."""
        return self.samples // self.texts_per_row

    def read_by(self, row: RowKind) -> Self:
        """See `trainers.inputs.Inputs`."""
        read = copy.copy(self)
        object.__setattr__(read, "row", row)  # no setting: the model decides
        return read

    @property
    def targets_length(self) -> int:
        """Tokens of a row that a decoder reads. The last token of a completion is only a target, so it needs no position."""
        whole = self.prompt_length + self.completion_length - 1
        return self.texts_per_row * (self.completion_length if self.row.encodes else whole)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return sum(self._lengths.values())

    @property
    def _lengths(self) -> dict[str, int]:
        targets = {"targets": self.targets_length}
        if not self.row.encodes:
            return targets
        return {"inputs": self.texts_per_row * (self.prompt_length - 1), **targets}

    @property
    def scores(self) -> frozenset[str]:
        """Scores among LOG_PROBS, REFERENCE and VALUES that `batch` needs."""
        raise NotImplementedError

    def columns(self, rows: int) -> inputs.Arrays:
        """Returns shapes and dtypes of the batch columns besides tokens."""
        raise NotImplementedError

    def batch(self, samples: Samples, score: Score) -> Arrays:
        """Returns the batch of a rollout, with the columns of `arrays`; `score` computes `scores` of rows' token columns."""
        raise NotImplementedError

    def arrays(self, rows: int) -> inputs.Arrays:
        """Returns shapes and dtypes of all columns of a batch."""
        return {**inputs.packed(self._lengths).arrays(rows), **self.columns(rows)}

    def packed(self, rows: Sequence[Sequence[inputs.Text]], source_B: np.ndarray) -> Arrays:
        """Returns the token columns of rows of texts, where the policy reads them."""
        if not self.row.encodes:
            return inputs.pack(rows, source_B, length=self.length)
        return inputs.pack_encoded(rows, source_B, **self._lengths)

    def one_in_a_row(self, samples: Samples) -> Arrays:
        """Returns token columns with one completion per row, and 'rewards' and 'ended' [R]."""
        texts = [
            [(samples.prompts[r // self.samples], completion)]
            for r, completion in enumerate(samples.completions)
        ]
        return {
            **self.packed(texts, np.repeat(samples.sources_P, self.samples)),
            "rewards": samples.rewards_PG.reshape(-1),
            "ended": samples.ended_PG.reshape(-1).astype(np.float32),
        }


def float_columns(shape: tuple[int, ...], *names: str) -> inputs.Arrays:
    """Returns float32 columns of the same shape, by name."""
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in names}
