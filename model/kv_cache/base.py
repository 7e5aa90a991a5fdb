"""The cache policy seam: what a decoder keeps of the keys and values it has seen.

A policy is a stateless object; its state is a pytree that goes in and comes out. Every slot carries
the position of its token, -1 while empty, so padding, unequal prompts, eviction and windows all
reduce to one mask by position.

Shapes: B batch, T new tokens, S slots, N query heads, K key/value heads, H head dim.
"""

import dataclasses
from typing import Any, Protocol

import flax.struct
import jax

from model.config import LayerKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """How a layer attends: arguments of attention_ops.dot_product_attention by their names.

    Attributes:
      scale: factor on the logits.
      softcap: c in c * tanh(logits / c), or None.
      window: keys each query sees, itself included; None for all earlier ones.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


@flax.struct.dataclass
class KeyValues:
    """What attention may look at: slots with position -1 are empty.

    Positions are [B, S], or [B, K, S] where every key/value head holds tokens of its own choice.
    """

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array


class CachePolicy(Protocol):
    """Pure functions over one layer's cache state."""

    def init(
        self,
        *,
        batch: int,
        length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        layer: int,
        kind: LayerKind,
    ) -> Any:
        """An empty state of layer `layer` (from 0), of kind `kind`, with room for `length` tokens."""
        ...

    def append(
        self,
        state: Any,
        *,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        positions_BT: jax.Array,
        q_BTNH: jax.Array,
        form: AttentionForm,
    ) -> Any:
        """Adds T tokens; position -1 marks padding.

        Queries, rotated as the keys are, and the form of the layer's attention are there for policies
        that score keys. Tokens of a prompt do not look at what this leaves in the state, only at each
        other (model/attention.py), so what a policy drops is missing from the next call on.
        """
        ...

    def view(self, state: Any) -> KeyValues:
        """The keys and values to attend to."""
        ...

    def compress(self, state: Any, *, length: int) -> Any:
        """Turns a prefilled state into the one decoding starts from, with room for `length` more."""
        ...
