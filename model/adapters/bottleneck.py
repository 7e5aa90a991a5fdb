"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751): a small MLP with a residual after attention and MLP.

Shapes: R rows sorted by expert, E experts, X in, Y out.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import Size, recordable
from espalier.model import axes
from espalier.model.adapters.adapter import Adapted, Adapter
from espalier.model.linear import Dense
from espalier.model.mlp import activation
from espalier.model.moe.grouped_matmul import grouped_matmul
from espalier.model.moe.moe import ExpertDense


@recordable
class Bottleneck(Adapter):
    """y + up(act(down(y))) (Houlsby et al., arXiv 1902.00751), where y [..., Y] is the output of a projection.

    `up` is zero at the start, so the model is then the base model. Each stacked expert has a bottleneck of its own.

    Attributes:
      layers: patterns of the projections; the last ones of attention and MLP by default.
      width: hidden units.
      activation: name in mlp.ACTIVATIONS.
    """

    layers: Sequence[str] = (r"(.*/)?\w*attention/out", r"(.*/)?mlp/down")
    width: Size = 64
    activation: str = "gelu"

    @property
    def of_experts(self) -> bool:
        return True

    @nn.compact
    def __call__(self, site: Adapted, x: jax.Array, *sizes: jax.Array) -> jax.Array:
        y = site.base(x, *sizes)
        common = {"dtype": y.dtype, "param_dtype": self.param_dtype}
        width, zeros = site.axes[1], {"kernel_init": nn.initializers.zeros}
        dense: Any
        if sizes:
            experts = {"num_experts": site.base.num_experts, **common}
            lead = site.base.axes[:1]
            dense = BiasedExperts
        else:
            experts, lead, dense = {"use_bias": True, **common}, (), Dense
        down = dense(features=self.width, axes=(*lead, width, axes.RANK), name="down", **experts)
        up_axes = (*lead, axes.RANK, width)
        up = dense(features=y.shape[-1], axes=up_axes, name="up", **zeros, **experts)
        return y + up(activation(self.activation)(down(y, *sizes)), *sizes)


class BiasedExperts(ExpertDense):
    """Projections of stacked experts, with a bias [E, 1, Y]."""

    def product(self, rows_RX: jax.Array, sizes_E: jax.Array) -> jax.Array:
        names = (self.axes[0], axes.NORM, self.axes[2])
        shape = (self.num_experts, 1, self.features)
        zeros = nn.initializers.zeros
        bias_E1Y = axes.parameter(self, "bias", zeros, names, shape, self.param_dtype)
        ones_R1 = jnp.ones((len(rows_RX), 1), self.dtype)
        of_rows = grouped_matmul(ones_R1, bias_E1Y.astype(self.dtype), sizes_E, names=names[1:])
        return super().product(rows_RX, sizes_E) + of_rows
