"""Biases that balance the load of experts without a loss (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

A mixture adds a bias to each expert's score where it chooses experts, not where it weighs them (routing.choice_bias). After
each step the bias of expert e changes by its load in that step:

  b_e <- b_e + rate * sign(mean load - load_e)

The load is the number of choices of real tokens, before any limit of capacity, over all devices and microbatches of the step.
Loads are whole numbers and are compared as such. Biases are stored among the parameters, without gradient or optimiser.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from espalier.common.ranges import NonNegative
from espalier.model.moe.routing import CHOICE_BIAS
from espalier.trainers import trainable
from espalier.trainers.extensions import StepExtension, Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceBias(StepExtension):
    """Moves the biases of all mixtures that have them (moe.MoeMlp.balance_bias).

    A step whose update is dropped moves none. A moving average of the parameters averages biases too; an average that an
    optimiser defines has the newest ones.

    Attributes:
      rate: by how much a bias changes in a step; scores lie between 0 and 1. 0 keeps biases as they are (DeepSeek-V3 at
        the end of its training).
    """

    name = "balance_bias"
    reads_counts = True

    rate: NonNegative = 0.001

    def init(self, params: Any, mask: Any) -> None:
        """Returns None: the state has no part for biases.

        Raises:
          ValueError: no mixture has biases, or the routers beside them are not trained.
        """
        names = [
            trainable.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        owners = [name.rpartition("/")[0] for name in names if name.split("/")[-1] == CHOICE_BIAS]
        if not owners:
            raise ValueError(
                "BalanceBias moves the biases of mixtures of experts, and this model has none: set moe.MoeMlp.balance_bias = "
                "True, or leave out extensions.named.balance_bias (methods/moe/balance_bias.gin)."
            )
        if mask is None or not self.rate:
            return
        trained = [name for name, keep in zip(names, jax.tree.leaves(mask), strict=True) if keep]
        for owner in owners:
            if not any(name.startswith(f"{owner}/router/") for name in trained):
                raise ValueError(
                    f"BalanceBias would move {owner}/{CHOICE_BIAS}, but its router is not trained: set BIAS_RATE = 0, which "
                    "keeps the biases, or train the router too (recipe.Recipe.trainable)."
                )

    def constants(self, update: Update) -> Any:
        """Returns the frozen parameters with moved biases.

        Raises:
          ValueError: the objective does not pass on what layers count, or biases are among the trained parameters.
        """
        if update.counts is None:
            raise ValueError(
                "BalanceBias reads the loads of experts, and the objective reports none: leave out "
                "extensions.named.balance_bias, or return Forward.loss_out or mean_loss of the policy's forward pass."
            )
        return self._moved(update.frozen, update.counts)

    def _moved(self, frozen: Any, counts: Any) -> Any:
        if not isinstance(counts, Mapping):
            return frozen
        moved = {name: self._moved(frozen[name], below) for name, below in counts.items()}
        if CHOICE_BIAS in counts:
            if (bias_E := frozen[CHOICE_BIAS]) is None:
                raise ValueError(
                    f"{CHOICE_BIAS} is data among the parameters, which no optimiser may have: give the train step the mask of "
                    "trainable.mask_of."
                )
            moved[CHOICE_BIAS] = bias_E + self.rate * toward_mean(counts[CHOICE_BIAS])
        return {**frozen, **moved}


def toward_mean(counts_E: jax.Array) -> jax.Array:
    """Returns 1 for counts [..., E] below their mean, -1 for those above and 0 for equal ones, float32.

    Args:
      counts_E: integers. They are compared with the mean's whole part and rest: neither a quotient that is rounded nor a
        product that overflows.
    """
    size = counts_E.shape[-1]
    whole, rest = jnp.divmod(counts_E.sum(-1, keepdims=True), size)
    below = (counts_E < whole) | ((counts_E == whole) & (rest > 0))
    return below.astype(jnp.float32) - (counts_E > whole).astype(jnp.float32)
