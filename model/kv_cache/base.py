"""The cache policy seam: what a decoder keeps of the keys and values it has seen.

A policy is a stateless object; its state is a pytree that goes in and comes out. Every slot carries
the position of its token, -1 while empty, so padding, unequal prompts, eviction and windows all
reduce to one mask by position.

A state has two lives. `init` and `append` read a prompt, whole or in chunks, and drop nothing;
`compress` makes of it what decoding starts from; then `append` adds what is generated. Every array of
a state has the batch as its first axis or is a scalar, so that rows can be repeated and reordered.

Shapes: B batch, T new tokens, S slots, N query heads, K key/value heads, X heads with tokens of their
own, H head dim.
"""

import dataclasses
from typing import Any, Protocol, TypedDict

import flax.struct
import jax

from model.config import LayerKind
from model.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """The form of a layer's attention.

    Attributes:
      scale: factor on the logits.
      softcap: c in c * tanh(logits / c), or None.
      window: keys each query sees, itself included; None for all earlier ones.
      rope: what has rotated queries and keys, each by its position; None where nothing has.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    rope: Rope | None = None

    def arguments(self) -> dict[str, Any]:
        """Returns keywords of attention_ops.dot_product_attention."""
        return {"scale": self.scale, "softcap": self.softcap, "window": self.window}


@flax.struct.dataclass
class KeyValues:
    """Keys and values that attention reads: slots with position -1 are empty.

    Positions are [B, S], or [B, X, S] where heads hold tokens of their own choice: X is a multiple of
    the heads of k and v and divides N, so that one store may serve heads that see different slots.
    With scales, keys and values are int8 and mean k * k_scale and v * v_scale.
    """

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    k_scale_BSK: jax.Array | None = None
    v_scale_BSK: jax.Array | None = None


class CacheSizes(TypedDict):
    """Sizes of one layer's cache, keywords of `CachePolicy.init`.

    `num_heads` are query heads N, `num_kv_heads` key/value heads K; `layer` counts from 0 to `num_layers` - 1.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    layer: int
    num_layers: int
    kind: LayerKind


class CachePolicy(Protocol):
    """Pure functions over one layer's cache state.

    Attributes:
      future: tokens at the end of what is read that are dropped again, so that decoding starts before
        them; 0 for all but the oracle.
    """

    future: int

    def init(
        self,
        *,
        batch: int,
        length: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        layer: int,
        num_layers: int,
        kind: LayerKind,
    ) -> Any:
        """An empty state, with room for `length` tokens.

        It is that of layer `layer` (from 0) of `num_layers`, of kind `kind`.
        """
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
        that score keys. Tokens of a prompt that is read at once look at each other, not at what this
        leaves in the state (model/attention.py), so it may be compressed already.
        """
        ...

    def view(self, state: Any) -> KeyValues:
        """The keys and values to attend to."""
        ...

    def compress(self, state: Any, *, length: int, dtype: Any = None) -> Any:
        """Turns a state that has read a prompt into the one decoding starts from.

        Args:
          state: of `append`.
          length: tokens that there will be room for.
          dtype: of the stored keys and values: None for the state's own; int8 for integers with
            a float32 scale per token and head.
        """
        ...
