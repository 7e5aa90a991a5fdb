"""The objective seam: what every loss reads and returns."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.struct
import jax
from jax.sharding import Mesh

from trainers.partitioning import Rules

Batch = Mapping[str, jax.Array]
# name -> (sum, weight); divided after both are summed over microbatches, steps or hosts.
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class LossOut:
    """A loss as numerator and weight, so that any split of the batch gives the same quotient.

    Attributes:
      sum: weighted sum of per-token (or per-example) losses, float32 scalar; differentiated.
      weight: sum of the weights.
      metrics: name -> (sum, weight), scalars or vectors; summed over microbatches, divided once.
      variables: collections of the state it updated (batch statistics), whole, or None.
    """

    sum: jax.Array
    weight: jax.Array
    metrics: Metrics
    variables: Any = None


# (params, batch, rng) -> LossOut. The rng is None in evaluation, where nothing is dropped.
LossFn = Callable[[Any, Batch, jax.Array | None], LossOut]


class StatefulLossFn(Protocol):
    """A loss that reads more than parameters and batch.

    `variables` are the train state's collections; empty for a model without them. The loss may return new ones, which the
    next microbatch reads; evaluation (no rng) discards them. `extras` are the extras of the `Objective`.
    """

    def __call__(
        self,
        params: Any,
        batch: Batch,
        rng: jax.Array | None,
        *,
        variables: Mapping[str, Any],
        extras: Any,
    ) -> LossOut: ...


class StoredExtras(Protocol):
    """Extras that lie on disk: a step can be compiled without reading them, for devices that are absent too."""

    def check(self, mesh: Mesh, rules: Rules, meta: Mapping[str, Any]) -> None:
        """Checks what lies on disk without reading its arrays; called before and after data are opened.

        Args:
          mesh, rules: of the run.
          meta: facts of the run so far; with the data open, 'vocabulary' is the digest of theirs.

        Raises:
          ValueError: extras that are missing, or do not fit; it names the setting and the remedy.
        """
        ...

    def abstract(self, mesh: Mesh, rules: Rules) -> Any:
        """Shapes, dtypes and shardings of what `read` returns."""
        ...

    def read(self, mesh: Mesh, rules: Rules) -> Any:
        """The arrays; called once, when the first step is about to run."""
        ...


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Objective:
    """A `StatefulLossFn` and what it needs; for other losses a plain `LossFn` will do.

    Attributes:
      loss_fn: the loss.
      extras: a pytree of arrays that do not change, such as reference parameters, or None. They are
        an argument of the compiled step: one that closes over arrays cannot span hosts.
      stored_extras: reads the extras from disk, in place of `extras`.
    """

    loss_fn: StatefulLossFn
    extras: Any = None
    stored_extras: StoredExtras | None = None

    def __call__(
        self,
        params: Any,
        batch: Batch,
        rng: jax.Array | None,
        *,
        variables: Mapping[str, Any] | None = None,
        extras: Any = None,
    ) -> LossOut:
        """The loss; without `extras`, of the objective's own."""
        extras = self.extras if extras is None else extras
        return self.loss_fn(params, batch, rng, variables=variables or {}, extras=extras)

    @classmethod
    def of(cls, loss_fn: LossFn) -> "Objective":
        """`loss_fn` itself if it is an objective, else an objective that passes it neither variables nor extras."""
        if isinstance(loss_fn, cls):
            return loss_fn
        return cls(loss_fn=lambda params, batch, rng, **_: loss_fn(params, batch, rng))
