"""A judge that scores each answer by its mean log-probability under a checkpoint."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.launch.evaluation.judges import checkpoint as checkpoints
from espalier.launch.evaluation.judges.base import (
    TIE,
    A,
    B,
    JudgeError,
    Outcome,
    Pair,
    Question,
    Reply,
)


class RewardJudge:
    """Scores each answer on its own; the higher score wins. A repeated question would get the same score.

    Args:
      reward: has `name` and `identity` as a Judge, and `scores` as LogProb.
      margin: scores that differ by no more are a tie.

    Raises:
      JudgeError: the margin is negative or not finite.
    """

    attempts = 1

    def __init__(self, reward: Any, *, margin: float = 0.0):
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
            yield i, Reply(value=score if math.isfinite(score) else None)

    def outcome(self, first: Reply, second: Reply) -> Outcome:
        assert first.value is not None and second.value is not None
        difference = float(first.value) - float(second.value)
        if abs(difference) <= self._margin:
            return Outcome(verdict=TIE)
        return Outcome(verdict=A if difference > 0 else B)


class LogProb:
    """log p(answer | prompt) in nats, averaged over the answer's tokens: the sum of launch.score over their number.

    An answer to messages is the assistant's turn with the chat template's end. An empty text has no tokens and therefore
    no score.

    Args:
      config, settings, checkpoint, params, batch_size: see checkpoint.CheckpointWriter.

    Raises:
      JudgeError, FileNotFoundError, DamagedCheckpointError: see there.
    """

    def __init__(
        self,
        config: Any,
        *,
        settings: str,
        checkpoint: str,
        params: str = "auto",
        batch_size: int = 8,
    ):
        self._config = config
        self._step = checkpoints.resolved(checkpoint, batch_size=batch_size)
        self._params = params
        self._batch_size = batch_size
        self.name = f"logprob:{self._step}"
        self.identity: Mapping[str, Any] = {
            "kind": "logprob",
            **checkpoints.weights_identity(self._step, settings=settings, params=params),
        }

    def scores(self, asked: Sequence[Question]) -> Iterator[tuple[int, float]]:
        """Yields (index, score) for the single answer of every question, as they finish; NaN for no score."""
        from espalier.launch.inference.score import scored_row
        from espalier.trainers.scoring.scoring import Scorer

        with self._config.load(self._step, params=self._params) as run:
            rows = [scored_row(run, _row(run, q), str(q.about.get("id"))) for q in asked]
            order = sorted(
                range(len(rows)), key=lambda i: -len(rows[i].context) - len(rows[i].targets)
            )
            size = run.batch_size(self._batch_size, len(rows))
            scorer = Scorer(run.model, run.params, batch_size=size, sharding=run.row_sharding)
            for i, logp_T in zip(order, scorer.stream([rows[i] for i in order]), strict=True):
                yield i, float(logp_T.mean(dtype="float64")) if len(logp_T) else float("nan")


def _row(run: Any, question: Question) -> dict[str, Any]:
    (answer,) = question.answers
    if isinstance(question.prompt, str):
        targets = run.encode(answer, str(question.about.get("id")), as_text=True)
        return {"text": question.prompt, "targets": targets}
    return {"messages": [*question.prompt, {"role": "assistant", "content": answer}]}
