"""A checkpoint of this project as the writer of a judge's replies."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from espalier.launch.evaluation.judges.base import JudgeError
from espalier.launch.evaluation.judges.pairwise import OPENING
from espalier.launch.inference.chat_endpoint import Silence

# Where a model without a chat template begins to write.
_BEGUN = "\n\nComparison:"


class CheckpointWriter:
    """Writes replies, greedily at the first attempt; see launch/evaluation/judges/pairwise.py.

    Prompts are turns of a user if the model has a chat template, else texts to continue. Special tokens that they spell
    are text.

    Args:
      config: a load_run.RunConfig of the run that made the checkpoint.
      settings: the whole configuration as text, on which replies depend.
      checkpoint: step or run directory, or a Hugging Face directory.
      params: see launch/run/load_run.py.
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
        if self._converses:
            return {"messages": [{"role": "user", "content": prompt}]}
        return {"text": prompt + _BEGUN}

    @functools.cached_property
    def _converses(self) -> bool:
        own = getattr(self._config.vocabulary(), "chat_template", None)
        return self._config.chat_template is not None or own is not None


def resolved(checkpoint: str, *, batch_size: int) -> str:
    """Returns the step or Hugging Face directory that a judge reads now: a newer step of a run would change replies.

    Raises:
      JudgeError: there are several processes; only one could write replies.
      FileNotFoundError: the path has no checkpoint.
    """
    import jax

    from espalier.launch.run import load_run

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

    from espalier.launch.run import hf_checkpoint
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
