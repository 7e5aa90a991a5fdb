"""The interface of objectives: the inputs and outputs of every loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import flax.struct
import jax
from jax.sharding import Mesh

from espalier.model.axes import Rules

Batch = Mapping[str, jax.Array]
# name -> (sum, weight); divided after both are summed over microbatches, steps or hosts.
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class LossOut:
    """A loss as numerator and weight, so that its quotient does not depend on the split into microbatches.

    Attributes:
      sum: weighted sum of per-token (or per-example) losses, float32 scalar; differentiated.
      weight: sum of the weights.
      metrics: name -> (sum, weight), scalars or vectors; summed over microbatches, then divided.
      variables: complete collections of the state that the loss updated (such as batch statistics), or None.
      counts: what layers counted for the step (Forward.loss_out), int32 by path; summed over microbatches. None without.
    """

    sum: jax.Array
    weight: jax.Array
    metrics: Metrics
    variables: Any = None
    counts: Any = None


# (params, batch, rng) -> LossOut. The rng is None in evaluation, which has no dropout.
LossFn = Callable[[Any, Batch, jax.Array | None], LossOut]


_Function = TypeVar("_Function", bound=Callable[..., Any])


def loss_in(unit: str) -> Callable[[_Function], _Function]:
    """Declares the unit of an objective's loss, such as "nats per token", with which reports name it (launch/run/metric_rows.py)."""
    del unit
    return lambda objective: objective


class StoredExtras(Protocol):
    """Extras on disk. A step can be compiled without reading them, also for devices that are not attached."""

    def check(self, mesh: Mesh, rules: Rules, meta: Mapping[str, Any]) -> None:
        """Checks the files without reading their arrays; called before and after the data are opened.

        Args:
          mesh, rules: mesh and partitioning rules of the run.
          meta: facts of the run so far; once the data are open, 'vocabulary' is the digest of their vocabulary.

        Raises:
          ValueError: extras that are missing or do not match; the message names the setting and the remedy.
        """

    def check_trained(self, params: Any, mask: Any) -> None:
        """Raises ValueError if the extras would move with a parameter that is trained: all, or those True in `mask`."""
        return

    def abstract(self, mesh: Mesh, rules: Rules) -> Any:
        """Returns shapes, dtypes and shardings of the arrays that `read` returns."""

    def read(self, mesh: Mesh, rules: Rules) -> Any:
        """Returns the arrays; called once, just before the first step."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Objective:
    """A loss that also reads the state's collections and constant arrays; a recipe may also use a plain `LossFn`.

    Attributes:
      loss_fn: (params, batch, rng, *, variables, extras) -> LossOut. `variables` are the train state's collections; the
        loss may return updated ones, which the next microbatch reads, and evaluation (no rng) discards them.
      stored_extras: reads `extras`, such as reference parameters, from disk. They are an argument of the compiled step,
        because a step that closes over arrays cannot span hosts.
    """

    loss_fn: Callable[..., LossOut]
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
        return self.loss_fn(params, batch, rng, variables=variables or {}, extras=extras)

    @classmethod
    def of(cls, loss_fn: LossFn) -> "Objective":
        """Returns `loss_fn` if it is an objective, else an objective that calls it without variables and extras."""
        if isinstance(loss_fn, cls):
            return loss_fn
        return cls(loss_fn=lambda params, batch, rng, **_: loss_fn(params, batch, rng))
