"""A reference model that is run beside the policy in every step, in place of stored log-probabilities."""

import dataclasses
import os
from typing import Any

import jax
from jax.sharding import Mesh

from trainers import initialise, restore_params
from trainers.objectives import completions
from trainers.objectives.base import Batch
from trainers.partitioning import Rules


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LiveReference:
    """The reference's parameters, read when the first step runs, and what they say of a batch of pairs.

    Attributes:
      model: of the reference, a decoder-only module.
      checkpoint: step or run directory that its parameters are read from.
      use_ema: read their moving average.
    """

    model: Any
    checkpoint: str | os.PathLike | None
    use_ema: bool = False

    def __post_init__(self):
        if self.checkpoint is None:
            raise ValueError(
                "REFERENCE is None: name the checkpoint that the policy is compared with, which is most often "
                "what it starts from (INITIAL_CHECKPOINT_PATH)."
            )

    def abstract(self, mesh: Mesh, rules: Rules) -> Any:
        """Shapes, dtypes and shardings of the parameters."""
        return initialise.abstract_params(self.model, mesh, rules)

    def read(self, mesh: Mesh, rules: Rules) -> Any:
        """The parameters; raises what `restore_params` raises."""
        assert self.checkpoint is not None  # see __post_init__
        return restore_params.restore_params(
            self.checkpoint, self.abstract(mesh, rules), use_ema=self.use_ema
        )

    def log_probs(self, params: Any, batch: Batch, *, implementation: Any = "auto") -> jax.Array:
        """Log-probabilities of the completions of a batch, [B, 2K], through which no gradient flows."""
        frozen = jax.lax.stop_gradient(params)
        sums_BS, _ = completions.log_probs(
            self.model, {"params": frozen}, batch, implementation=implementation
        )
        return jax.lax.stop_gradient(sums_BS)
