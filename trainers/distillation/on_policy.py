"""On-policy distillation: a student learns the distributions of a teacher over its own samples (GKD, arXiv 2306.13649).

Batches are the student's completions, and `trainers.distillation.objective.distillation` is their objective, with a `Teacher` or, for
prompts of several languages, `Teachers`.

Shapes: P prompts, G samples of each, R = P G rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from espalier.trainers import inputs
from espalier.trainers.distillation.objective import TEACHER_INDEX
from espalier.trainers.online.method import Arrays, Method, Samples, Score
from espalier.trainers.rewards.base import Completion

DEFAULT = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(Method):
    """Batches of the policy's completions, one in a row, whose prompts and rewards are not learnt.

    The column besides tokens is 'teacher_index' [R], int32.

    Attributes:
      prompt_length, completion_length, samples, updates: see `Method`.
      teachers: returns value of the column "language" of a prompt -> index of its teacher; "default" is for all other values, and
        for prompts without the column. It is called before the first batch.
    """

    teachers: Callable[[], Mapping[str, int]]

    @functools.cached_property
    def _index_of(self) -> Mapping[str, int]:
        return self.teachers()

    @property
    def scores(self) -> frozenset[str]:
        return frozenset()

    def columns(self, rows: int) -> inputs.Arrays:
        return {TEACHER_INDEX: jax.ShapeDtypeStruct((rows,), jnp.int32)}

    def batch(self, samples: Samples, score: Score) -> Arrays:
        del score
        columns = self.one_in_a_row(samples)
        index_P = np.array([self._teacher(info.get("language")) for info in samples.info_P])
        columns[TEACHER_INDEX] = np.repeat(index_P, self.samples).astype(np.int32)
        return {name: columns[name] for name in columns if name not in ("rewards", "ended")}

    def _teacher(self, language: object) -> int:
        index = self._index_of.get(str(language), self._index_of.get(DEFAULT))
        if index is None:
            raise ValueError(
                f"A prompt has the language {language!r}, for which no teacher is named: add it, or a {DEFAULT!r}, to 'fixed' of "
                "TEACHER_POOL."
            )
        return index


def no_reward(completions: Sequence[Completion]) -> np.ndarray:
    """Returns 0 for each completion: a distilled policy needs no reward."""
    return np.zeros(len(completions), np.float32)
