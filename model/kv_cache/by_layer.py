"""A cache policy of its own for each layer: the layers' policies do not know of one another."""

import dataclasses
from typing import Any, Unpack

import flax.struct
import jax

from espalier.model.kv_cache.base import AttentionForm, CachePolicy, CacheSizes, KeyValues


@flax.struct.dataclass
class OfLayer:
    """The state of a layer's policy, and the layer's index."""

    state: Any
    layer: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class ByLayer:
    """Repeats a list of policies over the layers.

    Attributes:
      policies: those of the first layers, in order; their number divides the number of layers.

    Raises:
      ValueError: an empty list, a policy that reads its continuation, or a list within the list. `init` raises it where the
        number of policies does not divide the number of layers.
    """

    policies: tuple[CachePolicy, ...]

    future = 0

    def __post_init__(self):
        if not self.policies:
            raise ValueError("A list of cache policies needs at least one policy.")
        for policy in self.policies:
            if policy.future or isinstance(policy, ByLayer):
                raise ValueError(
                    f"{type(policy).__name__} cannot be the cache policy of some layers only: choose another."
                )

    def of(self, layer: int) -> CachePolicy:
        """Returns the policy of the layer with index `layer`."""
        return self.policies[layer % len(self.policies)]

    def init(self, *, batch: int, length: int, **sizes: Unpack[CacheSizes]) -> OfLayer:
        layer, layers = sizes["layer"], sizes["num_layers"]
        if layers % len(self.policies):
            raise ValueError(
                f"{len(self.policies)} cache policies, which are repeated over the layers, do not divide their number, "
                f"{layers}: list one for each layer, or a number that divides {layers}."
            )
        return OfLayer(self.of(layer).init(batch=batch, length=length, **sizes), layer)

    def append(self, state: OfLayer, *, form: AttentionForm, **arrays: jax.Array) -> OfLayer:
        return OfLayer(self.of(state.layer).append(state.state, form=form, **arrays), state.layer)

    def view(self, state: OfLayer) -> KeyValues:
        return self.of(state.layer).view(state.state)

    def compress(self, state: OfLayer, *, length: int, dtype: Any = None) -> OfLayer:
        small = self.of(state.layer).compress(state.state, length=length, dtype=dtype)
        return OfLayer(small, state.layer)
