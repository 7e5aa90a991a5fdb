"""Checkpoints of this project as judges: as the writer of replies, or by the mean log-probability of each answer."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.launch.evaluate.judges.asking import (
    TIE,
    A,
    B,
    JudgeError,
    Outcome,
    Pair,
    Question,
    Reply,
)
from espalier.launch.evaluate.judges.pairwise import OPENING
from espalier.launch.inference.chat_endpoint import Silence

# Where a model without a chat template begins to write.
_BEGUN = "\n\nComparison:"


class CheckpointWriter:
    """Writes replies, greedily at the first attempt; see launch/evaluate/judges/pairwise.py.

    Prompts are turns of a user if the model has a chat template, else texts to continue. Special tokens that they spell
    are text.

    Args:
      config: a load_run.RunConfig of the run that made the checkpoint.
      settings: the whole configuration as text, on which replies depend.
      checkpoint: step or run directory, or a Hugging Face directory.
      params: see launch/load/load_run.py.
      max_tokens: maximum tokens of a reply.
      batch_size: prompts at a time.

    Raises:
      JudgeError: several processes, or a size below 1.
      FileNotFoundError, DamagedCheckpointError: there is no undamaged checkpoint.
    """

    def __init__(
        self,
        config: Any,
        *,
        settings: str,
        checkpoint: str,
        params: str = "auto",
        max_tokens: int = 128,
        batch_size: int = 8,
    ):
        if max_tokens < 1:
            raise JudgeError(f"max_tokens={max_tokens} of --judge must be at least 1.")
        # Prompts hold texts of others.
        self._config = config and dataclasses.replace(config, special_tokens="nowhere")
        self._step = resolved(checkpoint, batch_size=batch_size)
        self._params = params
        self._max_tokens = max_tokens
        self._batch_size = batch_size
        self.name = f"checkpoint:{self._step}"
        self.identity = {
            "kind": "checkpoint",
            **weights_identity(self._step, settings=settings, params=params),
            "max_tokens": max_tokens,
        }

    def write(
        self, prompts: Sequence[str], *, temperature: float, seed: int
    ) -> Iterator[tuple[int, str | Silence]]:
        from espalier.launch.inference import generate
        from espalier.trainers.decoding.sampling import Sampling
        from espalier.trainers.decoding.settings import Settings

        # Rows are batched by similar length. In this order the rows of a batch are adjacent, so that their replies are
        # written as soon as the batch is done.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        written = generate.generate(
            self._config,
            [(f"prompt {i}", self._row(prompts[i])) for i in order],
            checkpoint=self._step,
            params=self._params,
            settings=Settings(
                max_new_tokens=self._max_tokens, sampling=Sampling(temperature=temperature)
            ),
            stops=(OPENING,),
            seed=seed,
            batch_size=self._batch_size,
        )
        for i, row in zip(order, written, strict=True):
            yield i, row["text"]

    def _row(self, prompt: str) -> dict[str, Any]:
        if self._config.converses:
            return {"messages": [{"role": "user", "content": prompt}]}
        return {"text": prompt + _BEGUN}


def resolved(checkpoint: str, *, batch_size: int) -> str:
    """Returns the step or Hugging Face directory that a judge reads now: a newer step of a run would change replies.

    Raises:
      JudgeError: there are several processes; only one could write replies.
      FileNotFoundError: the path has no checkpoint.
    """
    import jax

    from espalier.launch.load import load_run

    if jax.process_count() > 1:
        raise JudgeError(
            f"A checkpoint judges in one process, not in {jax.process_count()}; it uses all devices of a host."
        )
    if batch_size < 1:
        raise JudgeError(f"batch_size={batch_size} of --judge must be at least 1.")
    return load_run.place(checkpoint)


def weights_identity(step: str, *, settings: str, params: str) -> dict[str, Any]:
    """Returns digests of everything that a checkpoint's outputs depend on: arrays, configuration, choice of parameters.

    Raises:
      DamagedCheckpointError: the manifest of the step is damaged; a Hugging Face directory has none.
    """
    from etils import epath

    from espalier.launch.load import hf_checkpoint
    from espalier.trainers.checkpoints import step_dir

    if hf_checkpoint.is_hf(step):
        weights = hf_checkpoint.digest(step)
        # The record of its model is in a folder that each process names anew.
        settings = settings.replace(hf_checkpoint.recorded(step)[0], step)
    else:
        manifest = step_dir.read_manifest(epath.Path(step)).to_bytes()
        weights = hashlib.sha256(manifest).hexdigest()
    return {
        "weights": weights[:32],
        "configuration": hashlib.sha256(settings.encode()).hexdigest()[:32],
        "params": params,
    }


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
    """log p(answer | prompt) in nats, averaged over the answer's tokens: the sum of espalier score over their number.

    An answer to messages is the assistant's turn with the chat template's end. An empty text has no tokens and therefore
    no score.

    Args:
      config, settings, checkpoint, params, batch_size: see CheckpointWriter.

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
        self._step = resolved(checkpoint, batch_size=batch_size)
        self._params = params
        self._batch_size = batch_size
        self.name = f"logprob:{self._step}"
        self.identity: Mapping[str, Any] = {
            "kind": "logprob",
            **weights_identity(self._step, settings=settings, params=params),
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
