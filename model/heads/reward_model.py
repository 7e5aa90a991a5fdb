"""A language model's body with one number for each token in place of logits: reward models.

The number at a token is a linear function of its final hidden state, as transformers' models for sequence
classification with one label have it; of a text the reward is that of its last token.

Shapes: B batch, T length, D width.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from model import axes
from model.linear import Dense


class RewardModel(nn.Module):
    """Parameters are `backbone/...`, which are those of the language model, and `reward_head/kernel` [D, 1].

    A language model's own head, where it is not its token table, is not among them. The head begins with zeros,
    so that no text is better than another until something has been learned, and reads and says float32.

    Attributes:
      backbone: a decoder-only module.
      head: factory of the head, called with (features=, axes=, kernel_init=, name=).
    """

    backbone: nn.Module
    head: Callable[..., nn.Module] = Dense

    @property
    def config(self) -> Any:
        """Sizes of the language model."""
        return self.backbone.config

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, **context: Any) -> jax.Array:
        """Rewards [B, T] after each token and all before it; arguments as in `Transformer.hidden`."""
        hidden_BTD = self.backbone.hidden(tokens_BT, **context).hidden_BTD
        return scalar_head(self.head, "reward_head")(hidden_BTD.astype(jnp.float32))[..., 0]


def scalar_head(head: Callable[..., nn.Module], name: str | None) -> nn.Module:
    """A module of D numbers, zeros at first, that gives one; without a name that of the attribute it is given to."""
    return head(
        features=1,
        axes=(axes.EMBED, axes.UNMODELED),
        kernel_init=nn.initializers.zeros,
        name=name,
    )
