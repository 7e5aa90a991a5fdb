"""Sizes and numeric policy of a transformer, shared by all of its modules."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from espalier.common.ranges import Layers, Size, recordable
from espalier.model import axes, layer_groups
from espalier.model.layer_groups import Group

Remat = Literal["none", "full", "dots"]
REMAT_POLICIES = get_args(Remat)
LAYER_KINDS = ("full", "sliding", "full_nope", "bidirectional")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """The settings that differ between layers: attention mask, rotary embedding, the MLP's kind, and depth.

    Two kinds are equal if all of these but depth are equal. Depth is not compared, because it may
    be a traced array.

    Attributes:
      window: keys each query sees, itself included; None for all earlier keys.
      rope: whether queries and keys are rotated (Cohere2's full layers are not).
      causal: whether a query sees only keys up to itself; False in encoders.
      mlp: name of the layer's MLP, which `mlp.by_kind` reads; '' in models whose layers have one.
      depth: index of the layer, from 0. An int where layers are unrolled; an int32 scalar under `nn.scan`, which
        traces the pattern once for all repeats; None for a module outside of a model.
    """

    window: int | None = None
    rope: bool = True
    causal: bool = True
    mlp: str = ""
    depth: int | jax.Array | None = dataclasses.field(default=None, compare=False)


class FloatDtypes:
    """The dtypes of a config with the fields `dtype` and `param_dtype`."""

    dtype: str
    param_dtype: str

    def dtype_problems(self) -> list[str]:
        """Returns a sentence for each name that is not a float dtype."""
        return [
            f"{name} = {getattr(self, name)!r} is not a float dtype"
            for name in ("dtype", "param_dtype")
            if getattr(self, name) not in ("float32", "bfloat16", "float16", "float64")
        ]

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def storage_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.param_dtype)


@recordable
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(FloatDtypes):
    """Shared sizes. Settings of one module (activation, norm, biases) belong to that module.

    Attributes:
      vocab_size: V, rows of the embedding, padding rows included.
      num_layers: L.
      embed_dim: D.
      num_heads: N query heads.
      num_kv_heads: K key/value heads, dividing N; None for N (multi-head attention).
      head_dim: H; None for D / N.
      mlp_dim: F, the hidden width of the MLP (of each of gate and up when gated).
      layer_pattern: kinds of layers, repeated, the last time perhaps in part: 'full', 'sliding', 'full_nope' (no rotation), and
        'bidirectional' of encoders, which encoder-decoders set themselves. A kind may name its MLP: 'full:dense', see
        `mlp.by_kind`. Models without a period list all L layers.
      sliding_window: window of 'sliding' layers.
      dtype: compute dtype of products and activations; norms, softmax and loss use float32.
      scan_layers: whether `nn.scan` loops over the traced blocks of each of `layer_groups`; otherwise every layer is unrolled.
      remat: 'none'; 'full' saves only layer inputs; 'dots' also saves weight products.

    Raises:
      ValueError: a size that does not divide, or an unknown name; all problems in one message.
    """

    vocab_size: Size
    num_layers: Layers
    embed_dim: Size
    num_heads: Size
    mlp_dim: Size
    num_kv_heads: Size | None = None
    head_dim: Size | None = None
    layer_pattern: tuple[str, ...] = ("full",)
    sliding_window: Size | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: Remat = "none"

    def __post_init__(self):
        problems = []
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim"):
            if getattr(self, name) < 1:
                problems.append(f"{name} = {getattr(self, name)} must be positive")
        if self.num_heads and self.head_dim is None and self.embed_dim % self.num_heads:
            problems.append(
                f"embed_dim = {self.embed_dim} is not a multiple of num_heads = {self.num_heads}; "
                "set head_dim"
            )
        if self.kv_heads and self.num_heads % self.kv_heads:
            problems.append(
                f"num_kv_heads = {self.kv_heads} does not divide num_heads = {self.num_heads}"
            )
        if not 1 <= len(self.layer_pattern) <= max(self.num_layers, 1):
            problems.append(
                f"layer_pattern has {len(self.layer_pattern)} kinds for num_layers = {self.num_layers}"
            )
        for kind in self.layer_pattern:
            name, colon, mlp = kind.partition(":")
            if name not in LAYER_KINDS:
                problems.append(f"layer_pattern names {kind!r}; known kinds are {LAYER_KINDS}")
            if colon and not mlp:
                problems.append(f"layer_pattern names no MLP after the colon of {kind!r}")
        if not self.sliding_window and any(_attention(x) == "sliding" for x in self.layer_pattern):
            problems.append("a 'sliding' layer needs sliding_window")
        if self.remat not in REMAT_POLICIES:
            problems.append(f"remat = {self.remat!r}; known policies are {REMAT_POLICIES}")
        problems += self.dtype_problems()
        if problems:
            raise ValueError("TransformerConfig: " + "; ".join(problems) + ".")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def per_head_dim(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    def axis_sizes(self) -> tuple[tuple[str, int, str], ...]:
        """Returns the sizes that a mesh may split, as (logical axis, size, name of the setting)."""
        return (
            (axes.HEADS, self.num_heads, "num_heads"),
            (axes.KV_HEADS, self.kv_heads, "num_kv_heads"),
            (axes.MLP, self.mlp_dim, "mlp_dim"),
            (axes.EMBED, self.embed_dim, "embed_dim"),
            (axes.VOCAB, self.vocab_size, "vocab_size"),
            *(
                (axes.LAYERS, repeats, "num_layers over the pattern")
                for repeats in sorted({group.repeats for group in self.layer_groups})
            ),
        )

    @property
    def layer_groups(self) -> tuple[Group, ...]:
        """The groups of layers that repeat the same blocks; each is a scan."""
        return layer_groups.divided(tuple(self.layer_pattern), self.num_layers)

    @property
    def kind_names(self) -> tuple[str, ...]:
        """The kinds of all layers, as in `layer_pattern`."""
        pattern = tuple(self.layer_pattern)
        return (pattern * -(-self.num_layers // len(pattern)))[: self.num_layers]

    def layer_kind(self, layer: int) -> LayerKind:
        """Returns the kind of the layer with index `layer`, from 0."""
        name, _, mlp = self.layer_pattern[layer % len(self.layer_pattern)].partition(":")
        window = self.sliding_window if name == "sliding" else None
        return LayerKind(
            window=window,
            rope=name != "full_nope",
            causal=name != "bidirectional",
            mlp=mlp,
            depth=layer,
        )

    def bidirectional(self, num_layers: int) -> "TransformerConfig":
        """Returns the sizes of an encoder of so many layers, whose pattern has the length and the MLPs of this one."""
        pattern = (
            f"bidirectional{kind.removeprefix(_attention(kind))}" for kind in self.layer_pattern
        )
        return dataclasses.replace(
            self, num_layers=num_layers, layer_pattern=tuple(pattern)[:num_layers]
        )


def _attention(kind: str) -> str:
    """Returns the part of a kind's name that says its attention: 'full' of 'full:dense'."""
    return kind.partition(":")[0]
