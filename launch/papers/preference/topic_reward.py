"""The known quality of texts of the generated language, as a reward."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.preference import topic_language
from espalier.trainers.rewards.base import Completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopicReward:
    """`topic_language.reward` of completions of prompts on topics: a `Reward`.

    Attributes:
      vocabulary: of the language's symbols.
    """

    vocabulary: Any

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        """float32 [N]."""
        return np.array([self._of(completion) for completion in completions], np.float32)

    def _of(self, completion: Completion) -> float:
        prompt, text = (
            self.vocabulary.decode(list(ids)) for ids in (completion.prompt, completion.tokens)
        )
        return topic_language.reward(prompt, text, ended=completion.ended)
