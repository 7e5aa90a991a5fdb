"""The decoder-only transformer: blocks, the stack that scans them, and the language model on top.

Sublayers are factories (`Block.attention`, `Block.mlp`, `Block.norm`, and their `dense`), so a method
replaces a class by a gin binding and does not change this file.

Shapes: B batch, T length, D width, V vocabulary, L layers, P length of the layer pattern.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from model import axes, flops
from model.attention import Attention
from model.config import LayerKind, TransformerConfig
from model.embed import Embed
from model.flops import Counted
from model.kv_cache.base import CachePolicy, CacheSizes
from model.mlp import GatedMlp
from model.norm import RMSNorm
from model.protocol import Arrays, LayerSettings, Output, Row
from model.ranges import Positive

Layout = Literal["sequential", "parallel"]
LAYOUTS = get_args(Layout)


@flax.struct.dataclass
class Hidden:
    """The hidden states after the final norm, and the caches of all layers (None while training)."""

    hidden_BTD: jax.Array
    caches: Any = None


class Block(Counted):
    """One layer. `sequential`: x + attn(n1(x)), then x + mlp(n2(x)). `parallel`: both read n1(x).

    Attributes:
      layout: 'sequential' (GPT, Llama) or 'parallel' (GPT-J, Cohere; one norm per block).
      attention: factory, called with (config=, kind=, name=).
      mlp: factory, called with (config=, kind=, name=), of a module called with (x_BTD, segments_BT=).
      norm: factory, called with (name=).
      post_norm: factory of norms on the outputs of attention and MLP (Gemma 2), called with (name=), or None.
    """

    config: TransformerConfig
    kind: LayerKind = LayerKind()
    layout: Layout = "sequential"
    attention: Callable[..., nn.Module] = Attention
    mlp: Callable[..., nn.Module] = GatedMlp
    norm: Callable[..., nn.Module] = RMSNorm
    post_norm: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        cache: Any = None,
        policy: CachePolicy | None = None,
    ) -> tuple[jax.Array, Any]:
        if self.layout not in LAYOUTS:
            raise ValueError(f"Block.layout = {self.layout!r}: choose from {LAYOUTS}.")
        attention, mlp = self._attention(), self._mlp()
        normed_BTD = self.norm(name="norm")(x_BTD)
        attended_BTD, cache = attention(
            normed_BTD,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            cache=cache,
            policy=policy,
        )
        attended_BTD = self._normed("attention_post_norm", attended_BTD)
        if self.layout == "parallel":
            out_BTD = mlp(normed_BTD, segments_BT=segments_BT)
            y_BTD = x_BTD + attended_BTD + self._normed("mlp_post_norm", out_BTD)
        else:
            x_BTD = x_BTD + attended_BTD
            out_BTD = mlp(self.norm(name="mlp_norm")(x_BTD), segments_BT=segments_BT)
            y_BTD = x_BTD + self._normed("mlp_post_norm", out_BTD)
        return axes.constrain(y_BTD, axes.BATCH, axes.LENGTH, axes.ACT_EMBED), cache

    @property
    def settings(self) -> LayerSettings:
        return LayerSettings(
            kind=self.kind, attention=self._attention().settings, mlp=self._mlp().settings
        )

    @nn.nowrap
    def flops_per_token(self, shapes: Mapping[str, Any], *, length: int) -> float:
        attention = self._attention().flops_per_token(shapes["attention"], length=length)
        return attention + self._mlp().flops_per_token(shapes["mlp"], length=length)

    @nn.nowrap
    def _attention(self) -> Any:
        return self.attention(config=self.config, kind=self.kind, name="attention")

    @nn.nowrap
    def _mlp(self) -> Any:
        return self.mlp(config=self.config, kind=self.kind, name="mlp")

    def _normed(self, name: str, out_BTD: jax.Array) -> jax.Array:
        return out_BTD if self.post_norm is None else self.post_norm(name=name)(out_BTD)


class Layers(nn.Module):
    """Blocks `block_0`, `block_1`, ...: one period of the layer pattern if scanned, otherwise all L layers."""

    config: TransformerConfig
    block: Callable[..., nn.Module]
    count: int

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        caches: Sequence[Any] | None,
        *,
        first: int | jax.Array = 0,
        **context: Any,
    ) -> tuple[jax.Array, Any]:
        """Applies the blocks in order; `first` is the depth of the first block."""
        new_caches = []
        for i in range(self.count):
            kind = dataclasses.replace(self.config.layer_kind(i), depth=first + i)
            block = self.block(config=self.config, kind=kind, name=f"block_{i}")
            cache = None if caches is None else caches[i]
            apply = _rematerialised(self.config, cache, context)
            x_BTD, cache = apply(block, x_BTD)
            new_caches.append(cache)
        return x_BTD, None if caches is None else new_caches


def _rematerialised(config: TransformerConfig, cache: Any, context: dict[str, Any]) -> Callable:
    """Returns a function (block, x) -> (x, cache) with the rematerialisation of `config.remat`."""

    def apply(block: nn.Module, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        return block(x_BTD, cache=cache, **context)

    if config.remat == "none" or cache is not None:
        return apply
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policy = None if config.remat == "full" else dots
    # Inside a scan, the loop already prevents XLA from merging the two forward passes.
    return nn.remat(apply, policy=policy, prevent_cse=not config.scan_layers)


class Transformer(nn.Module):
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
    """

    row: ClassVar[Row] = "tokens"
    output: ClassVar[Output] = "logits"

    config: TransformerConfig
    block: Callable[..., nn.Module] = Block
    norm: Callable[..., nn.Module] = RMSNorm
    embed: Callable[..., nn.Module] = Embed
    position_embed: Callable[..., nn.Module] | None = None
    tie_embeddings: bool = True
    embed_scale: Positive = 1.0
    logit_scale: Positive = 1.0
    logit_softcap: Positive | None = None

    def setup(self):
        config = self.config
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
        count = len(config.layer_pattern) if config.scan_layers else config.num_layers
        self.layers = Layers(config=config, block=self.block, count=count)
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
        x_BTD = axes.constrain(x_BTD, axes.BATCH, axes.LENGTH, axes.ACT_EMBED)
        context: dict[str, Any] = dict(
            positions_BT=positions_BT, segments_BT=segments_BT, policy=policy
        )
        if self.config.scan_layers:
            if caches is not None:
                raise ValueError(
                    "Caches need unrolled layers: use layer_stack.unrolled(model) and "
                    "layer_stack.unroll(params, config), both of model/transforms/layer_stack.py."
                )
            x_BTD = self._scan(x_BTD, context)
        else:
            x_BTD, caches = self.layers(x_BTD, caches, **context)
        return Hidden(hidden_BTD=self.final_norm(x_BTD), caches=caches)

    def _scan(self, x_BTD: jax.Array, context: dict[str, Any]) -> jax.Array:
        period = len(self.config.layer_pattern)
        repeats = self.config.num_layers // period
        scan = nn.scan(
            lambda layers, x_BTD, first: layers(x_BTD, None, first=first, **context),
            # Stack all collections of a block (parameters, sown values); every layer has its own RNGs.
            variable_axes={True: 0},
            split_rngs={True: True},
            length=repeats,
            metadata_params={nn.PARTITION_NAME: axes.LAYERS},
        )
        # For layers that read their depth; if no layer does, it is not in the compiled program.
        first_depths = jnp.arange(repeats, dtype=jnp.int32) * period
        x_BTD, _ = scan(self.layers, x_BTD, first_depths)
        return x_BTD

    def head_VD(self) -> jax.Array:
        """Returns the output matrix [V, D]."""
        return self.token_embed.embedding if self.tie_embeddings else self.lm_head.embedding

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns the scaled, soft-capped float32 logits [B, T, V] of hidden states."""
        logits_BTV = self.logit_scale * jnp.einsum(
            "btd,vd->btv",
            hidden_BTD,
            self.head_VD().astype(hidden_BTD.dtype),
            preferred_element_type=jnp.float32,
        )
        if self.logit_softcap is not None:
            logits_BTV = self.logit_softcap * jnp.tanh(logits_BTV / self.logit_softcap)
        return logits_BTV

    def __call__(self, tokens_BT: jax.Array, **context: Any) -> jax.Array:
        """Returns the logits [B, T, V]; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens_BT, **context).hidden_BTD)

    # The interface of model/protocol.py, called outside of `apply`.

    @property
    def max_length(self) -> int | None:
        if self.position_embed is None:
            return None
        return self.position_embed(features=self.config.embed_dim).num_positions

    @property
    def inference_model(self) -> "Transformer":
        return self

    @nn.nowrap
    def inference_params(self, params: Any) -> Any:
        return params

    @nn.nowrap
    def layer_settings(self) -> Sequence[LayerSettings]:
        return [self._block(layer).settings for layer in range(self.config.num_layers)]

    @nn.nowrap
    def cache_sizes(self, layer: int) -> CacheSizes:
        settings = self._block(layer).settings
        return {
            "num_heads": settings.attention.query_heads,
            "num_kv_heads": settings.attention.cache_heads,
            "head_dim": settings.attention.head_dim,
            "dtype": self.config.compute_dtype,
            "layer": layer,
            "num_layers": self.config.num_layers,
            "kind": settings.kind,
        }

    @nn.nowrap
    def forward_flops(self, row: Arrays, variables: Any = None) -> float:
        """Returns the FLOPs of a forward pass for one token, logits included."""
        logits = 2.0 * self.config.vocab_size * self.config.embed_dim
        return self.hidden_flops(row, variables) + logits

    @nn.nowrap
    def hidden_flops(self, row: Arrays, variables: Any = None) -> float:
        """Returns the FLOPs of a forward pass for one token, without logits."""
        tokens = row["decoder_input_tokens"]
        if variables is None:
            variables = flops.variable_shapes(self, jax.ShapeDtypeStruct((1, 1), tokens.dtype))
        config, total = self.config, 0.0
        count = len(config.layer_pattern) if config.scan_layers else config.num_layers
        for layer in range(count):
            shapes = variables["params"]["layers"][f"block_{layer}"]
            if config.scan_layers:  # the first axis is the scan's
                shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
            total += self._block(layer).flops_per_token(shapes, length=tokens.shape[-1])
        return total * (config.num_layers // count)

    @nn.nowrap
    def _block(self, layer: int) -> Any:
        """Returns the block module of a layer, unbound, for its settings."""
        return self.block(
            config=self.config, kind=self.config.layer_kind(layer), name=f"block_{layer}"
        )
