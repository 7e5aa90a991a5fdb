"""A language model with a second head that predicts the reward: PPO's policy and critic share a backbone.

Shapes: B batch, T length, D width, V vocabulary.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import recordable
from espalier.model.heads.reward_model import BackboneModel, backbone_variables, scalar_head
from espalier.model.protocol import Arrays, Output
from espalier.model.transformer import Hidden


@recordable
class ActorCritic(BackboneModel):
    """A language model whose `__call__` also returns values; token losses use it as a language model.

    The parameters are `backbone/...` of the language model and `value_head/kernel` [D, 1], initialised to zeros.
    """

    output: ClassVar[Output] = "logits"
    inference_part: ClassVar[str] = "backbone"

    def setup(self):
        self.value_head = scalar_head(self.head, None)

    @nn.nowrap
    def forward_flops(self, row: Arrays, variables: Any = None) -> float:
        variables = backbone_variables(variables)
        return self.backbone.forward_flops(row, variables) + self.head_flops(row)

    @property
    def logit_scale(self) -> float:
        return self.backbone.logit_scale

    @property
    def logit_softcap(self) -> float | None:
        return self.backbone.logit_softcap

    def hidden(self, tokens_BT: jax.Array, **context: Any) -> Hidden:
        """Returns the language model's hidden states and caches."""
        return self.backbone.hidden(tokens_BT, **context)

    def head_VD(self) -> jax.Array:
        """Returns the language model's output matrix [V, D]."""
        return self.backbone.head_VD()

    def values(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns the expected rewards [B, T] after each token, float32, from final hidden states."""
        return self.value_head(hidden_BTD.astype(jnp.float32))[..., 0]

    def __call__(self, tokens_BT: jax.Array, **context: Any) -> tuple[jax.Array, jax.Array]:
        """Returns logits [B, T, V] and values [B, T]."""
        hidden_BTD = self.backbone.hidden(tokens_BT, **context).hidden_BTD
        return self.backbone.logits(hidden_BTD), self.values(hidden_BTD)
