"""A reward model as a `Reward`. Shapes: B batch, T length of a decoder's text, N completions."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from espalier.common.end_tokens import read_ends
from espalier.common.ranges import Count, Size
from espalier.model.axes import Rules
from espalier.trainers import initialise, partitioning
from espalier.trainers.decoding.buckets import in_order
from espalier.trainers.objectives.forward import frozen_forward
from espalier.trainers.objectives.frozen_model import FrozenCheckpoint, FrozenModel
from espalier.trainers.rewards.base import Completion
from espalier.trainers.scoring.scoring import Batched, Row, encoded_columns, scored_columns


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CheckpointReward:
    """A reward model in a checkpoint, for a run whose policy reads the same tokens: a `StoredReward`.

    Attributes:
      model: a `model.heads.reward_model.RewardModel`.
      checkpoint: step or run directory of its parameters; a run uses the same step at every start.
      vocabulary: its EOS, as in `common.end_tokens.read_ends`, is appended to completions that ended.
      start_token: token before each prompt; None for none.
      batch_size: texts at a time, a multiple of the mesh's parts of a batch.
    """

    model: Any
    checkpoint: str | os.PathLike
    vocabulary: Any
    start_token: Count | None = 0
    batch_size: Size = 32

    def on(
        self, mesh: Mesh, rules: Rules, *, meta: Mapping[str, Any], folder: str | os.PathLike
    ) -> "ModelReward":
        """Returns the reward; raises errors of `FrozenModel.read`, and ValueError for other data or a batch that the mesh does not divide."""
        partitioning.validate(
            mesh=mesh,
            rules=rules,
            config=self.model.config,
            batch_size=self.batch_size,
            length=1,
            boxed_params=initialise.abstract_variables(self.model)["params"],
        )
        path, run = os.fspath(self.checkpoint), os.fspath(folder)
        stored = FrozenCheckpoint(macro="REWARD_CHECKPOINT", path=path, model_dir=run)
        meta = {**meta, "start_token": self.start_token}
        stored.check(stored.resolve(record=False), meta, encodes=self.model.row.encodes)
        return ModelReward(
            self.model,
            FrozenModel(model=self.model, checkpoint=stored).read(mesh, rules),
            start_token=self.start_token,
            end_token=next(iter(read_ends(self.vocabulary)), None),
            batch_size=self.batch_size,
            sharding=partitioning.batch_sharding(mesh, rules),
        )


class ModelReward:
    """The model's output at the last token of prompt and completion, computed in batches of similar length.

    Args:
      model, params: a `model.heads.reward_model.RewardModel` and its parameters.
      start_token: token before each prompt, of an encoder-decoder before each completion; None for none.
      end_token: appended to a completion that ended; None for none.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        start_token: int | None = 0,
        end_token: int | None = 1,
        batch_size: int = 8,
        sharding: NamedSharding | None = None,
    ):
        self._params, self._row = params, model.row
        self._before = [] if start_token is None else [start_token]
        self._after = [] if end_token is None else [end_token]
        if self._row.encodes and not self._before:
            raise ValueError(
                "start_token is None, and the completions that an encoder-decoder reads follow a start token: set it, to 0 for T5."
            )

        def score(params: Any, batch: Any) -> jax.Array:
            return frozen_forward(model, params, batch, method=None).output

        columns = encoded_columns if self._row.encodes else scored_columns
        self._score = Batched(score, columns, model, batch_size=batch_size, sharding=sharding)

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        """Returns rewards, float32 [N].

        Raises:
          ValueError: a text without a token, or longer than the model's learned positions.
        """
        texts = [self._text(completion) for completion in completions]
        lengths = [len(text.context) for text in texts]
        limit = self._score.limit
        for i, length in enumerate(lengths):
            if not length or (self._row.encodes and not texts[i].encoder_inputs):
                what = "has an empty prompt" if length else "and its prompt are empty"
                raise ValueError(f"Completion {i} {what}: give a token to score.")
            if limit is not None and length > limit:
                raise ValueError(
                    f"Completion {i} and its prompt have {length} tokens, but the reward model learned only "
                    f"{limit} positions."
                )
        rewards = in_order(self._score(self._params, texts, lengths))
        last = (rewards_T[n - 1] for rewards_T, n in zip(rewards, lengths, strict=True))
        return np.fromiter(last, np.float32, len(texts))

    def _text(self, completion: Completion) -> Row:
        """Returns the text that is read as a context; the one target is not."""
        placed = self._row.placed(self._before, completion.prompt)
        end = self._after if completion.ended else []
        context = [*placed.pop("context"), *completion.tokens, *end]
        return Row(context=context, targets=[0], **placed)
