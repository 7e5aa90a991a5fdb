"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751): a small MLP with a residual after attention and MLP."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from espalier.common.ranges import Size, recordable
from espalier.model import axes
from espalier.model.adapters.adapter import Adapted, Adapter
from espalier.model.linear import Dense
from espalier.model.mlp import activation


@recordable
class Bottleneck(Adapter):
    """y + up(act(down(y))), where y is the output of a projection; `up` is zero at the start.

    Attributes:
      layers: patterns of the projections; the last ones of attention and MLP by default.
      width: hidden units.
      activation: name in mlp.ACTIVATIONS.
    """

    layers: Sequence[str] = (r"(.*/)?\w*attention/out", r"(.*/)?mlp/down")
    width: Size = 64
    activation: str = "gelu"

    @nn.compact
    def __call__(self, site: Adapted, x: jax.Array) -> jax.Array:
        y = site.base(x)
        common = {"use_bias": True, "dtype": y.dtype, "param_dtype": self.param_dtype}
        width = site.axes[1]
        down = Dense(features=self.width, axes=(width, axes.RANK), name="down", **common)
        up = Dense(
            features=y.shape[-1],
            axes=(axes.RANK, width),
            kernel_init=nn.initializers.zeros,
            name="up",
            **common,
        )
        return y + up(activation(self.activation)(down(y)))
