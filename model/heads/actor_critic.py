"""A language model with a second head that says what reward to expect: the policy and critic of PPO in one body.

Shapes: B batch, T length, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from model.heads.reward_model import scalar_head
from model.linear import Dense
from model.transformer import Output


class ActorCritic(nn.Module):
    """Parameters are `backbone/...`, which are those of the language model, and `value_head/kernel` [D, 1], zeros at first.

    To losses of tokens it is the language model; `critic` says both.

    Attributes:
      backbone: a decoder-only module.
      head: factory of the value head, called with (features=, axes=, kernel_init=, name=).
    """

    backbone: nn.Module
    head: Callable[..., nn.Module] = Dense

    def setup(self):
        self.value_head = scalar_head(self.head, None)

    @property
    def config(self) -> Any:
        """Sizes of the language model."""
        return self.backbone.config

    @property
    def logit_scale(self) -> float:
        return self.backbone.logit_scale

    @property
    def logit_softcap(self) -> float | None:
        return self.backbone.logit_softcap

    def hidden(self, tokens_BT: jax.Array, **context: Any) -> Output:
        """As of the language model."""
        return self.backbone.hidden(tokens_BT, **context)

    def head_VD(self) -> jax.Array:
        """Rows of the language model's output matrix."""
        return self.backbone.head_VD()

    def values(self, hidden_BTD: jax.Array) -> jax.Array:
        """Rewards [B, T] to expect once each token has been read, float32; of final hidden states."""
        return self.value_head(hidden_BTD.astype(jnp.float32))[..., 0]

    def __call__(self, tokens_BT: jax.Array, **context: Any) -> tuple[jax.Array, jax.Array]:
        """Logits [B, T, V] and values [B, T]."""
        hidden_BTD = self.backbone.hidden(tokens_BT, **context).hidden_BTD
        return self.backbone.logits(hidden_BTD), self.values(hidden_BTD)


def language_model(model: Any) -> Any:
    """The language model in a model, which is the model itself where there is no critic."""
    return model.backbone if isinstance(model, ActorCritic) else model


def language_model_params(model: Any, params: Any) -> Any:
    """Of a model's parameters those of its language model."""
    return params["backbone"] if isinstance(model, ActorCritic) else params
