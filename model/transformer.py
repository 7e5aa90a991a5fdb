"""The block of a transformer, and the decoder-only language model.

Sublayers are factories (`Block.attention`, `Block.mlp`, `Block.norm`, and their `dense`), so a method
replaces a class by a gin binding and does not change this file.

Shapes: B batch, T length, D width, V vocabulary, L layers, P length of the layer pattern.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from espalier.common.ranges import Decay, Positive, recordable
from espalier.model import axes, flops, layers
from espalier.model.attention import Attention, CrossAttention, Encoded, PositionBias
from espalier.model.config import LayerKind, TransformerConfig
from espalier.model.embed import Embed, Table
from espalier.model.flops import Counted
from espalier.model.kernels import narrow
from espalier.model.kv_cache.base import CachePolicy, CacheSizes
from espalier.model.linear import dropped
from espalier.model.mlp import GatedMlp
from espalier.model.norm import RMSNorm
from espalier.model.protocol import Arrays, LayerSettings, OfLayers, Output
from espalier.model.rows import TOKENS, RowKind

Layout = Literal["sequential", "parallel", "parallel_norms"]
LAYOUTS = get_args(Layout)


@flax.struct.dataclass
class Hidden:
    """The hidden states after the final norm, and the caches of all layers (None while training)."""

    hidden_BTD: jax.Array
    caches: Any = None


@flax.struct.dataclass
class LayerCache:
    """The cache of a decoder's layer that also reads an encoder's output.

    Attributes:
      attention: the state of the cache policy.
      encoded: the layer's keys and values of the encoder's output.
    """

    attention: Any
    encoded: Encoded

    def with_encoded_as(self, dtype: Any) -> "LayerCache":
        """Returns the cache with the encoder's keys and values stored as in `Slots.stored_as`."""
        return LayerCache(self.attention, self.encoded.stored_as(dtype))


@recordable
class Block(Counted):
    """One layer. `sequential`: x + attn(n1(x)), then x + mlp(n2(x)). `parallel`: x + attn(n1(x)) + mlp(n1(x)).

    Layers of a decoder that reads an encoder's output, `encoded`, are sequential and have x + cross(n3(x)) in between.

    Attributes:
      layout: 'sequential' (GPT, Llama); 'parallel' (GPT-J, Cohere), with one norm per block, or 'parallel_norms'
        (GPT-NeoX), where the MLP reads n2(x).
      attention: factory, called with (config=, kind=, name=).
      mlp: factory, called with (config=, kind=, name=), of a module called with (x_BTD, segments_BT=).
      norm: factory of the norms before sublayers, called with (name=); None for none (OLMo 2, with `post_norm`).
      cross_attention: factory of attention over an encoder's output, called with (config=, kind=, name=).
      dropout: share of the output of every sublayer that training drops.
      post_norm: factory of norms on the outputs of attention and MLP (Gemma 2), called with (name=), or None.
    """

    config: TransformerConfig
    kind: LayerKind = LayerKind()
    layout: Layout = "sequential"
    attention: Callable[..., nn.Module] = Attention
    mlp: Callable[..., nn.Module] = GatedMlp
    norm: Callable[..., nn.Module] | None = RMSNorm
    post_norm: Callable[..., nn.Module] | None = None
    cross_attention: Callable[..., nn.Module] = CrossAttention
    dropout: Decay = 0.0

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        bias: PositionBias | None = None,
        encoded: Encoded | None = None,
        cache: Any = None,
        policy: CachePolicy | None = None,
    ) -> tuple[jax.Array, Any]:
        if self.layout not in LAYOUTS:
            raise ValueError(f"Block.layout = {self.layout!r}: choose from {LAYOUTS}.")
        if self.norm is None and self.layout == "parallel_norms":
            raise ValueError(
                "Block.layout = 'parallel_norms' has no effect with norm = None: use 'parallel'."
            )
        if isinstance(cache, LayerCache):
            cache, encoded = cache.attention, cache.encoded
        attention, mlp = self._attention(), self._mlp()
        normed_BTD = self._read("norm", x_BTD)
        attended_BTD, cache = attention(
            normed_BTD,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            cache=cache,
            policy=policy,
            **({} if bias is None else {"bias": bias}),
        )
        attended_BTD = self._normed("attention_post_norm", attended_BTD)
        if self.layout != "sequential":
            if encoded is not None:
                raise ValueError(
                    f"Block.layout = {self.layout!r} has no cross-attention: use 'sequential'."
                )
            if self.layout == "parallel_norms":
                normed_BTD = self._read("mlp_norm", x_BTD)
            out_BTD = mlp(normed_BTD, segments_BT=segments_BT)
            y_BTD = x_BTD + attended_BTD + self._normed("mlp_post_norm", out_BTD)
        else:
            x_BTD = x_BTD + attended_BTD
            if encoded is not None:
                cross_BTD, encoded = self._cross_attention()(
                    self._read("cross_norm", x_BTD), encoded=encoded, segments_BT=segments_BT
                )
                x_BTD = x_BTD + self._normed("cross_post_norm", cross_BTD)
                cache = None if cache is None else LayerCache(cache, encoded)
            out_BTD = mlp(self._read("mlp_norm", x_BTD), segments_BT=segments_BT)
            y_BTD = x_BTD + self._normed("mlp_post_norm", out_BTD)
        return axes.constrain(y_BTD, axes.BATCH, axes.LENGTH, axes.ACT_EMBED), cache

    @property
    def settings(self) -> LayerSettings:
        return LayerSettings(
            kind=self.kind, attention=self._attention().settings, mlp=self._mlp().settings
        )

    @nn.nowrap
    def flops_per_token(
        self, shapes: Mapping[str, Any], *, length: int, encoder_length: int = 0
    ) -> float:
        """Returns the FLOPs for one token; with `encoder_length`, cross-attention over so many tokens included."""
        total = self._attention().flops_per_token(shapes["attention"], length=length)
        total += self._mlp().flops_per_token(shapes["mlp"], length=length)
        if encoder_length:
            total += self._cross_attention().cross_flops_per_token(
                shapes["cross_attention"], length=length, encoder_length=encoder_length
            )
        return total

    @nn.nowrap
    def _attention(self) -> Any:
        return self.attention(config=self.config, kind=self.kind, name="attention")

    @nn.nowrap
    def _mlp(self) -> Any:
        mlp: Any = self.mlp(config=self.config, kind=self.kind, name="mlp")
        if self.kind.mlp and getattr(mlp, "kind", LayerKind()).mlp:
            raise ValueError(
                f"layer_pattern names the MLP {self.kind.mlp!r}, but all layers have a {type(mlp).__name__}: make the blocks' MLPs "
                "with mlp.by_kind."
            )
        return mlp

    @nn.nowrap
    def _cross_attention(self) -> Any:
        return self.cross_attention(config=self.config, kind=self.kind, name="cross_attention")

    def _read(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """Returns what a sublayer reads: x after the norm of this name, if there are norms before sublayers."""
        return x_BTD if self.norm is None else self.norm(name=name)(x_BTD)

    def _normed(self, name: str, out_BTD: jax.Array) -> jax.Array:
        """Returns a sublayer's output after its norm and dropout."""
        out_BTD = out_BTD if self.post_norm is None else self.post_norm(name=name)(out_BTD)
        return dropped(self, out_BTD, self.dropout)


def scaled_logits(model: Any, hidden_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Returns float32 logits [B, T, V] with the scale and soft cap of a model."""
    head_VD = head_VD.astype(hidden_BTD.dtype)
    if narrow.applies(head_VD):
        logits_BTV = narrow.product(hidden_BTD, head_VD, 0)
    else:
        logits_BTV = jnp.einsum(
            "btd,vd->btv", hidden_BTD, head_VD, preferred_element_type=jnp.float32
        )
    logits_BTV = model.logit_scale * logits_BTV
    if model.logit_softcap is not None:
        logits_BTV = model.logit_softcap * jnp.tanh(logits_BTV / model.logit_softcap)
    return logits_BTV


class LanguageHead(OfLayers, nn.Module):
    """The head of a language model: the token table if `tie_embeddings`, else `lm_head`."""

    def head_VD(self: Any) -> jax.Array:
        """Returns the output matrix [V, D]."""
        return self.token_embed.embedding if self.tie_embeddings else self.lm_head.embedding

    def logits(self: Any, hidden_BTD: jax.Array) -> jax.Array:
        """Returns the scaled, soft-capped float32 logits [B, T, V] of hidden states."""
        return scaled_logits(self, hidden_BTD, self.head_VD())

    def __call__(self: Any, tokens_BT: jax.Array, **context: Any) -> jax.Array:
        """Returns the logits [B, T, V]; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens_BT, **context).hidden_BTD)

    @nn.nowrap
    def _logits_flops(self: Any, variables: Any) -> float:
        """Returns the FLOPs of the logits of a token."""
        name = "token_embed" if self.tie_embeddings else "lm_head"
        table = None if variables is None else variables["params"].get(name)
        return flops.logits_flops(self.config, table)


def cache_sizes_of(settings: LayerSettings, config: TransformerConfig, layer: int) -> CacheSizes:
    """Returns the sizes of the cache of layer `layer`, from its settings."""
    return {
        "num_heads": settings.attention.query_heads,
        "num_kv_heads": settings.attention.cache_heads,
        "head_dim": settings.attention.head_dim,
        "dtype": config.compute_dtype,
        "layer": layer,
        "num_layers": config.num_layers,
        "kind": settings.kind,
    }


@recordable
class Transformer(LanguageHead):
    """Decoder-only language model.

    Attributes:
      block: factory of a layer, called with (config=, kind=, name=).
      norm: factory of the final norm.
      embed: factory of the token table.
      position_embed: factory of a learned position table (GPT-2) with `num_positions` rows, or None.
      tie_embeddings: whether the head is the token table; otherwise it is lm_head/embedding [V, D].
      embed_scale: factor on the looked-up embeddings, rounded to the compute dtype (Gemma: sqrt(D)).
      logit_scale: factor on the logits (Cohere).
      logit_softcap: c in c * tanh(logits / c) (Gemma 2), or None.
      dropout: share of the embeddings, and of the final norm's output, that training drops.
    """

    row: ClassVar[RowKind] = TOKENS
    output: ClassVar[Output] = "logits"
    inference_part: ClassVar[str] = ""

    config: TransformerConfig
    block: Callable[..., nn.Module] = Block
    norm: Callable[..., nn.Module] = RMSNorm
    embed: Table = Embed
    position_embed: Callable[..., nn.Module] | None = None
    tie_embeddings: bool = True
    embed_scale: Positive = 1.0
    logit_scale: Positive = 1.0
    logit_softcap: Positive | None = None
    dropout: Decay = 0.0

    def setup(self):
        config = self.config
        if not all(kind.causal for kind in map(config.layer_kind, range(config.num_layers))):
            raise ValueError("A decoder-only Transformer cannot have 'bidirectional' layers.")
        table = functools.partial(
            self.embed,
            num_embeddings=config.vocab_size,
            features=config.embed_dim,
            dtype=config.compute_dtype,
            param_dtype=config.storage_dtype,
        )
        self.token_embed = table()
        if self.position_embed is not None:
            self.positions = self.position_embed(
                features=config.embed_dim,
                dtype=config.compute_dtype,
                param_dtype=config.storage_dtype,
            )
        self.layers = layers.Layers(config=config, block=self.block)
        self.final_norm = self.norm()
        if not self.tie_embeddings:
            # Stored as rows [V, D] like the token table, so that one loss serves both.
            self.lm_head = table()

    def hidden(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        caches: Sequence[Any] | None = None,
        policy: CachePolicy | None = None,
    ) -> Hidden:
        """Returns the final hidden states and the caches.

        Args:
          tokens_BT: token ids.
          positions_BT: position of each token within its document; None for 0, 1, 2, ...
          segments_BT: tokens attend only within equal segments; None for one document per row. With
            caches, which must then be empty, the tokens are a prompt and attend only to each other.
          caches: one cache state per layer, with `policy`; needs unrolled layers.
          policy: cache policy; None while training.
        """
        if positions_BT is None:
            positions_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
            positions_BT = jnp.broadcast_to(positions_T[None], tokens_BT.shape)
        scale = jnp.asarray(self.embed_scale, self.config.compute_dtype)
        x_BTD = self.token_embed(tokens_BT) * scale
        if self.position_embed is not None:
            x_BTD = x_BTD + self.positions(positions_BT)
        x_BTD = dropped(self, x_BTD, self.dropout)
        x_BTD = axes.constrain(x_BTD, axes.BATCH, axes.LENGTH, axes.ACT_EMBED)
        context: dict[str, Any] = dict(
            positions_BT=positions_BT, segments_BT=segments_BT, policy=policy
        )
        x_BTD, caches = layers.apply(self.layers, x_BTD, caches, context)
        hidden_BTD = dropped(self, self.final_norm(x_BTD), self.dropout)
        return Hidden(hidden_BTD=hidden_BTD, caches=caches)

    # The interface of model/protocol.py, called outside of `apply`.

    @property
    def max_length(self) -> int | None:
        if self.position_embed is None:
            return None
        return self.position_embed(features=self.config.embed_dim).num_positions

    @nn.nowrap
    def layer_settings(self) -> Sequence[LayerSettings]:
        return [self._block(layer).settings for layer in range(self.config.num_layers)]

    @nn.nowrap
    def cache_sizes(self, layer: int) -> CacheSizes:
        return cache_sizes_of(self._block(layer).settings, self.config, layer)

    @nn.nowrap
    def forward_flops(self, row: Arrays, variables: Any = None) -> float:
        """Returns the FLOPs of a forward pass for one token, logits included."""
        return self.hidden_flops(row, variables) + self._logits_flops(variables)

    @nn.nowrap
    def hidden_flops(self, row: Arrays, variables: Any = None) -> float:
        """Returns the FLOPs of a forward pass for one token, without logits."""
        tokens = row["decoder_input_tokens"]
        if variables is None:
            variables = flops.variable_shapes(self, jax.ShapeDtypeStruct((1, 1), tokens.dtype))
        shapes, length = variables["params"]["layers"], tokens.shape[-1]
        return layers.flops_per_token(self.config, self.block, shapes, length=length)

    @nn.nowrap
    def _block(self, layer: int) -> Any:
        """Returns the block module of a layer, unbound, for its settings."""
        return self.block(
            config=self.config, kind=self.config.layer_kind(layer), name=f"block_{layer}"
        )
