"""A judge that scores each answer on its own; the higher score wins.

The score can be any function of a prompt and an answer: the log-probability under a checkpoint
(launch/evaluation/judges/log_prob.py), or the output of a reward model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from launch.evaluation.judges.base import TIE, A, B, JudgeError, Outcome, Pair, Question, Reply


class Reward(Protocol):
    """A scalar function of a prompt and an answer.

    Attributes:
      name: name for messages.
      identity: JSON of everything besides prompt and answer that scores depend on.
    """

    name: str
    identity: Mapping[str, Any]

    def scores(self, asked: Sequence[Question]) -> Iterator[tuple[int, float]]:
        """Yields (index, score) for the single answer of every question, as they finish; NaN for no score."""


class RewardJudge:
    """See launch/evaluation/judges/base.py. A question has one attempt, because another score would be the same.

    Args:
      reward: scores answers.
      margin: scores that differ by no more are a tie.

    Raises:
      JudgeError: the margin is negative or not finite.
    """

    attempts = 1

    def __init__(self, reward: Reward, *, margin: float = 0.0):
        if not 0 <= margin < math.inf:
            raise JudgeError(f"margin={margin} of --judge must be 0 or positive, and finite.")
        self._reward = reward
        self._margin = margin
        self.name = reward.name
        self.identity = reward.identity

    def questions(self, pair: Pair) -> tuple[Question, Question]:
        a, b = (
            Question(prompt=pair.prompt, answers=(answer,), about={"id": pair.id, "of": system})
            for answer, system in zip((pair.a, pair.b), pair.systems, strict=True)
        )
        return a, b

    def replies(self, asked: Sequence[Question], attempt: int) -> Iterator[tuple[int, Reply]]:
        for i, score in self._reward.scores(asked):
            yield i, Reply(value=score if math.isfinite(score) else None, text="")

    def outcome(self, first: Reply, second: Reply) -> Outcome:
        if first.value is None or second.value is None:
            return Outcome(verdict=None)
        difference = float(first.value) - float(second.value)
        if abs(difference) <= self._margin:
            return Outcome(verdict=TIE)
        return Outcome(verdict=A) if difference > 0 else Outcome(verdict=B)
