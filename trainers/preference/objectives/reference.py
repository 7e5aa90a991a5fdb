"""A reference model that is run beside the policy in every step, in place of stored log-probabilities."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from trainers import initialise
from trainers.checkpoints import restore_params
from trainers.objectives.base import Batch
from trainers.objectives.forward import frozen_forward
from trainers.partitioning import Rules
from trainers.preference.objectives import completions
from trainers.preference.reference_checkpoint import ReferenceCheckpoint


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LiveReference:
    """The reference's parameters, read when the first step runs, and what they say of a batch of pairs.

    Attributes:
      model: of the reference, a decoder-only module.
      checkpoint: that its parameters are read from.
    """

    model: Any
    checkpoint: ReferenceCheckpoint

    def abstract(self, mesh: Mesh, rules: Rules) -> Any:
        """Shapes, dtypes and shardings of the parameters."""
        return initialise.abstract_params(self.model, mesh, rules)

    def read(self, mesh: Mesh, rules: Rules) -> Any:
        """The parameters; raises what `ReferenceCheckpoint.find` and `restore_params` raise."""
        return restore_params.restore_params(
            self.checkpoint.find().step,
            self.abstract(mesh, rules),
            use_ema=self.checkpoint.use_ema,
        )

    def log_probs(self, params: Any, batch: Batch, *, implementation: Any = "auto") -> jax.Array:
        """Log-probabilities of the completions of a batch, [B, 2K], through which no gradient flows."""
        out = frozen_forward(self.model, params, batch)
        return completions.by_completion(batch, out.log_probs_BT(implementation=implementation))
