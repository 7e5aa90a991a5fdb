"""T5: an encoder that reads the inputs, and a decoder that reads the encoder's output and predicts the targets.

Raffel et al., arXiv 1910.10683; version 1.1 has gated MLPs and a head of its own (Shazeer, arXiv 2002.05202), as mT5
(arXiv 2010.11934). The layers are those of model/transformer.py.

Shapes: B batch, S encoder length, T decoder length, D width, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import CalledWith, Decay, Layers, Positive, recordable
from espalier.model import axes, flops, layers
from espalier.model.attention import Encoded
from espalier.model.config import TransformerConfig
from espalier.model.embed import Embed, Table
from espalier.model.kv_cache.base import CachePolicy, CacheSizes
from espalier.model.linear import dropped
from espalier.model.norm import RMSNorm
from espalier.model.protocol import Arrays, LayerSettings, Output
from espalier.model.rows import INPUTS_AND_TARGETS, RowKind
from espalier.model.t5.relative_bias import RelativeBias
from espalier.model.transformer import Block, Hidden, LanguageHead, cache_sizes_of


class Stack(nn.Module):
    """The encoder or the decoder: layers with one relative position bias, and a final norm.

    Attributes:
      block, norm: see `EncoderDecoder`.
      relative_bias: factory, called with (num_heads=, bidirectional=, dtype=, param_dtype=), or None.
      dropout: share of the embeddings, and of the final norm's output, that training drops.
    """

    config: TransformerConfig
    block: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    relative_bias: Callable[..., nn.Module] | None
    dropout: Decay

    def setup(self):
        config = self.config
        self.layers = layers.Layers(config=config, block=self.block)
        self.final_norm = self.norm()
        if self.relative_bias is not None:
            self.position_bias = self.relative_bias(
                num_heads=config.num_heads,
                bidirectional=not config.layer_kind(0).causal,
                dtype=config.compute_dtype,
                param_dtype=config.storage_dtype,
            )

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array | None,
        caches: Sequence[Any] | None = None,
        **context: Any,
    ) -> Hidden:
        """Returns the outputs for embeddings x_BTD; positions are 0, 1, 2, ... if None."""
        B, T = x_BTD.shape[:2]
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        if self.relative_bias is not None:
            context["bias"] = self.position_bias(T, T)
        x_BTD = dropped(self, x_BTD, self.dropout)
        x_BTD = axes.constrain(x_BTD, axes.BATCH, axes.LENGTH, axes.ACT_EMBED)
        context["positions_BT"] = positions_BT
        x_BTD, caches = layers.apply(self.layers, x_BTD, caches, context)
        return Hidden(hidden_BTD=dropped(self, self.final_norm(x_BTD), self.dropout), caches=caches)


@recordable
class EncoderDecoder(LanguageHead):
    """Encoder-decoder language model of rows with inputs and targets.

    Attributes:
      config: sizes of both stacks; `num_layers` of the decoder.
      encoder_layers: number of the encoder's layers; None for `config.num_layers`.
      block: factory of a layer of either stack, called with (config=, kind=, name=).
      norm: factory of the final norms.
      embed: factory of the token table, which both stacks read.
      head: factory of the head's table [V, D], unless `tie_embeddings`.
      relative_bias: factory of a stack's position bias, see `Stack`; None for models with other positions.
      tie_embeddings: whether the head is the token table (T5, not 1.1).
      logit_scale: factor on the logits; D^-1/2 in T5 with a tied head.
      logit_softcap: c in c * tanh(logits / c), or None.
      dropout: share of the embeddings, and of the final norms' outputs, that training drops.
    """

    row: ClassVar[RowKind] = INPUTS_AND_TARGETS
    output: ClassVar[Output] = "logits"
    inference_part: ClassVar[str] = ""
    max_length: ClassVar[int | None] = None

    config: TransformerConfig
    encoder_layers: Layers | None = None
    block: Callable[..., nn.Module] = Block
    norm: Callable[..., nn.Module] = RMSNorm
    embed: Table = Embed
    head: Table = Embed
    relative_bias: Annotated[
        Callable[..., nn.Module] | None,
        CalledWith("bidirectional", "dtype", "num_heads", "param_dtype"),
    ] = RelativeBias
    tie_embeddings: bool = False
    logit_scale: Positive = 1.0
    logit_softcap: Positive | None = None
    dropout: Decay = 0.0

    @property
    def encoder_config(self) -> TransformerConfig:
        """The encoder's sizes, whose layers are bidirectional."""
        # Of the decoder's pattern, so that methods find the same blocks in both stacks.
        return self.config.bidirectional(self.encoder_layers or self.config.num_layers)

    def setup(self):
        config = self.config
        sizes = dict(
            num_embeddings=config.vocab_size,
            features=config.embed_dim,
            dtype=config.compute_dtype,
            param_dtype=config.storage_dtype,
        )
        self.token_embed = self.embed(**sizes)
        stack = functools.partial(
            Stack,
            block=self.block,
            norm=self.norm,
            relative_bias=self.relative_bias,
            dropout=self.dropout,
        )
        self.encoder = stack(config=self.encoder_config)
        self.decoder = stack(config=config)
        if not self.tie_embeddings:
            self.lm_head = self.head(**sizes)

    def encode(
        self,
        tokens_BS: jax.Array,
        *,
        positions_BS: jax.Array | None = None,
        segments_BS: jax.Array | None = None,
    ) -> Encoded:
        """Returns the encoder's output for inputs.

        Args:
          positions_BS: position of each token within its document; None for 0, 1, 2, ...
          segments_BS: tokens see only equal segments, and padding has segment 0; None for whole rows.
        """
        x_BSD = self.token_embed(tokens_BS)
        out = self.encoder(x_BSD, positions_BT=positions_BS, segments_BT=segments_BS)
        if segments_BS is not None:
            segments_BS = jnp.where(segments_BS == 0, -1, segments_BS)  # no target sees padding
        return Encoded(states_BSD=out.hidden_BTD, segments_BS=segments_BS)

    def hidden(
        self,
        tokens_BT: jax.Array,
        *,
        encoder_tokens_BS: jax.Array | None = None,
        encoder_positions_BS: jax.Array | None = None,
        encoder_segments_BS: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        caches: Sequence[Any] | None = None,
        policy: CachePolicy | None = None,
    ) -> Hidden:
        """Returns the final hidden states of the decoder and its caches.

        Args:
          tokens_BT: targets, shifted right.
          encoder_tokens_BS: inputs. None with caches that have read them.
          encoder_positions_BS, encoder_segments_BS: see `encode`.
          positions_BT: position of each token within its targets; None for 0, 1, 2, ...
          segments_BT: targets attend only to targets and inputs of an equal segment; None for whole rows, whose segment
            is 1.
          caches, policy: as in model/transformer.py. The first call also reads the inputs.

        Raises:
          ValueError: there are no inputs.
        """
        encoded = None
        if encoder_tokens_BS is None and self.is_initializing():
            encoder_tokens_BS = tokens_BT  # parameters do not depend on the inputs
        if encoder_tokens_BS is not None:
            encoded = self.encode(
                encoder_tokens_BS,
                positions_BS=encoder_positions_BS,
                segments_BS=encoder_segments_BS,
            )
        elif caches is None:
            raise ValueError(
                "An encoder-decoder reads rows with inputs: set TASK_FEATURE_LENGTHS = {'inputs': ..., 'targets': ...}."
            )
        return self.decoder(
            self.token_embed(tokens_BT),
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            encoded=encoded,
            caches=caches,
            policy=policy,
        )

    # The interface of model/protocol.py, called outside of `apply`.

    @nn.nowrap
    def layer_settings(self) -> Sequence[LayerSettings]:
        """Returns the settings of the encoder's layers, then of the decoder's."""
        return [
            self.block(config=config, kind=config.layer_kind(i), name=f"block_{i}").settings
            for config in (self.encoder_config, self.config)
            for i in range(config.num_layers)
        ]

    @nn.nowrap
    def cache_sizes(self, layer: int) -> CacheSizes:
        """Returns the sizes of the self-attention's cache of layer `layer` of the decoder."""
        settings = self.layer_settings()[self.encoder_config.num_layers + layer]
        return cache_sizes_of(settings, self.config, layer)

    @nn.nowrap
    def forward_flops(self, row: Arrays, variables: Any = None) -> float:
        """Returns the FLOPs of a row, logits included, divided by its places for inputs and targets."""
        T, S = row["decoder_input_tokens"].shape[-1], row["encoder_input_tokens"].shape[-1]
        return self.hidden_flops(row, variables) + T * self._logits_flops(variables) / (S + T)

    @nn.nowrap
    def hidden_flops(self, row: Arrays, variables: Any = None) -> float:
        """Returns the FLOPs of `hidden` for a row, divided by its places for inputs and targets."""
        targets = row["decoder_input_tokens"]
        T, S = targets.shape[-1], row["encoder_input_tokens"].shape[-1]
        if variables is None:
            variables = flops.variable_shapes(self, jax.ShapeDtypeStruct((1, 1), targets.dtype))
        stacks = variables["params"]
        encoder = layers.flops_per_token(
            self.encoder_config, self.block, stacks["encoder"]["layers"], length=S
        )
        decoder = layers.flops_per_token(
            self.config, self.block, stacks["decoder"]["layers"], length=T, encoder_length=S
        )
        return (S * encoder + T * decoder) / (S + T)
