"""The mean log-probability of an answer under a checkpoint, as a reward."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.evaluation.judges import checkpoint as checkpoints
from launch.evaluation.judges.base import Question


class LogProb:
    """log p(answer | prompt) in nats, averaged over the answer's tokens: the sum of launch.score over their number.

    An answer to messages is the assistant's turn with the chat template's end. An empty text has no tokens and therefore
    no score.

    Args:
      config, settings, checkpoint, params, batch_size: as of checkpoint.CheckpointWriter.

    Raises:
      JudgeError, FileNotFoundError, DamagedCheckpointError: as there.
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
        self._step = checkpoints.pinned(checkpoint, batch_size=batch_size)
        self._params = params
        self._batch_size = batch_size
        self.name = f"logprob:{self._step}"
        self.identity: Mapping[str, Any] = {
            "kind": "logprob",
            **checkpoints.weights_identity(self._step, settings=settings, params=params),
        }

    def scores(self, asked: Sequence[Question]) -> Iterator[tuple[int, float]]:
        """See launch/evaluation/judges/reward.py."""
        from launch.inference.score import scored_row
        from trainers.scoring.scoring import Scorer

        with self._config.load(self._step, params=self._params) as run:
            rows = [scored_row(run, _row(q), str(q.about.get("id"))) for q in asked]
            order = sorted(
                range(len(rows)), key=lambda i: -len(rows[i].context) - len(rows[i].targets)
            )
            size = run.batch_size(self._batch_size, len(rows))
            scorer = Scorer(run.model, run.params, batch_size=size, sharding=run.row_sharding)
            for i, logp_T in zip(order, scorer.stream([rows[i] for i in order]), strict=True):
                yield i, float(logp_T.mean(dtype="float64")) if len(logp_T) else float("nan")


def _row(question: Question) -> dict[str, Any]:
    (answer,) = question.answers
    if isinstance(question.prompt, str):
        return {"text": question.prompt, "targets": answer}
    return {"messages": [*question.prompt, {"role": "assistant", "content": answer}]}
