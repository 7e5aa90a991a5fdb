"""The policy without its adapters as the reference of a run: no checkpoint, no second copy of any parameter.

A frozen base model does not move while its adapters learn. So the base of a policy is the model that it started from, if it
started with new adapters.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from espalier.model.adapters.adapter import PREFIX, adapters_of
from espalier.model.axes import Rules
from espalier.model.protocol import inference_params
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.objectives.base import Batch, StoredExtras
from espalier.trainers.objectives.forward import Forward, frozen_forward


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OwnBase(StoredExtras):
    """Instead of a `FrozenModel`: `StoredExtras` without arrays.

    Attributes:
      model: the policy.
    """

    model: Any

    def check(self, mesh: Mesh, rules: Rules, meta: Mapping[str, Any]) -> None:
        """Raises ValueError if the policy has no adapters: it would be its own reference."""
        del mesh, rules, meta
        if adapters_of(self.model) is None:
            raise ValueError(
                "The reference is the policy without its adapters, and the policy has none: give a file with adapters, such as "
                "methods/adapters/lora.gin, or another reference."
            )

    def check_trained(self, params: Any, mask: Any) -> None:
        """Raises ValueError if a run trains parameters of the base, with which the reference would move."""
        base = state_tree.flatten(without_adapters(inference_params(self.model, params)))
        if mask is not None:
            trains = state_tree.flatten(without_adapters(inference_params(self.model, mask)))
            base = {name: leaf for name, leaf in base.items() if trains[name]}
        if base:
            raise ValueError(
                f"The reference is the policy without its adapters, and would move with {next(iter(base))}, which is trained: "
                "train adapters alone (TRAINED), or give another reference."
            )

    def abstract(self, mesh: Mesh, rules: Rules) -> Any:
        """Returns the empty tree."""
        del mesh, rules
        return {}

    def read(self, mesh: Mesh, rules: Rules) -> Any:
        """Returns the empty tree."""
        del mesh, rules
        return {}

    def forward(self, extras: Any, batch: Batch, policy: Any) -> Forward:
        """Returns a forward pass of the base on a batch, with no gradient to the policy's parameters."""
        del extras
        return frozen_forward(self.model, without_adapters(policy), batch)


def without_adapters(params: Any) -> Any:
    """Returns the parameters of the base model, with which an adapted model computes its base."""
    if not isinstance(params, Mapping):
        return params
    return {
        name: without_adapters(child)
        for name, child in params.items()
        if not name.startswith(PREFIX)
    }
