"""Reward models: a language model's backbone with one reward per token instead of logits.

The reward at a token is a linear function of its final hidden state, as in Hugging Face's models for sequence
classification with one label. The reward of a text is the reward at its last token.

Shapes: B batch, T length, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import CalledWith, recordable
from espalier.model import axes
from espalier.model.kv_cache.base import CacheSizes
from espalier.model.linear import Dense
from espalier.model.protocol import Arrays, LayerSettings, OfLayers, Output
from espalier.model.rows import RowKind


class BackboneModel(OfLayers, nn.Module):
    """A language model with another head: forwards the model protocol to the language model.

    Attributes:
      backbone: the language model. The head reads the final states of its decoder.
      head: factory of the head, called with (features=, axes=, kernel_init=, name=).
    """

    backbone: Any
    head: Annotated[
        Callable[..., nn.Module], CalledWith("features", "axes", "kernel_init", "name")
    ] = Dense

    @property
    def config(self) -> Any:
        """Sizes of the language model."""
        return self.backbone.config

    @property
    def row(self) -> RowKind:
        return self.backbone.row

    @property
    def max_length(self) -> int | None:
        return self.backbone.max_length

    @nn.nowrap
    def cache_sizes(self, layer: int) -> CacheSizes:
        return self.backbone.cache_sizes(layer)

    @nn.nowrap
    def layer_settings(self) -> Sequence[LayerSettings]:
        return self.backbone.layer_settings()

    @nn.nowrap
    def row_context(self, variables: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """See `Model`."""
        return self.backbone.row_context(backbone_variables(variables), batch)

    @nn.nowrap
    def head_flops(self, row: Arrays) -> float:
        """Returns the FLOPs of the head for one token of a row, of which it reads those of the decoder."""
        targets = row["decoder_input_tokens"].shape[-1]
        inputs = row["encoder_input_tokens"].shape[-1] if self.row.encodes else 0
        return 2.0 * self.config.embed_dim * targets / (targets + inputs)


def backbone_variables(variables: Any) -> Any:
    """Returns the language model's part of the variables; None for None."""
    return variables and {"params": variables["params"]["backbone"]}


@recordable
class RewardModel(BackboneModel):
    """A language model's backbone and a linear reward head.

    The parameters are `backbone/...` of the language model and `reward_head/kernel` [D, 1]. A language model head
    that is not tied to the token table is dropped. The reward head is computed in float32 and initialised to zeros,
    so that untrained rewards are equal.
    """

    output: ClassVar[Output] = "rewards"
    inference_part: ClassVar[str] = ""

    @nn.nowrap
    def forward_flops(self, row: Arrays, variables: Any = None) -> float:
        variables = backbone_variables(variables)
        return self.backbone.hidden_flops(row, variables) + self.head_flops(row)

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, **context: Any) -> jax.Array:
        """Returns the reward [B, T] of each prefix, at its last token; arguments as in `Transformer.hidden`."""
        hidden_BTD = self.backbone.hidden(tokens_BT, **context).hidden_BTD
        return scalar_head(self.head, "reward_head")(hidden_BTD.astype(jnp.float32))[..., 0]


def scalar_head(head: Callable[..., nn.Module], name: str | None) -> nn.Module:
    """Returns a projection [D, 1], initialised to zeros.

    Without a name, flax names a module made in `setup` after its attribute.
    """
    return head(
        features=1,
        axes=(axes.EMBED, axes.UNMODELED),
        kernel_init=nn.initializers.zeros,
        name=name,
    )
