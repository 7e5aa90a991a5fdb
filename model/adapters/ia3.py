"""(IA)3 (arXiv 2205.05638): learned vectors that rescale keys, values and the hidden units of MLPs.

Shapes: X width of the rescaled tensor, E experts, R rows.
"""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import recordable
from espalier.model import axes
from espalier.model.adapters.adapter import Adapted, Adapter, AdapterError, rescaled
from espalier.model.moe.grouped_matmul import grouped_matmul


class Rescaling(Adapter):
    """An adapter that multiplies the output of some projections and the input of others.

    Attributes:
      outputs: patterns of the projections whose output is rescaled, bias included: keys and values.
      inputs: patterns of the projections whose input is rescaled: the hidden units of an MLP, which in a gated MLP are
        the product of both branches.

    Raises:
      AdapterError: a path matches both.
    """

    PATTERNS: ClassVar[tuple[str, ...]] = ("outputs", "inputs")

    outputs: Sequence[str] = (r"(.*/)?\w*attention/(key|value)",)
    inputs: Sequence[str] = (r"(.*/)?(mlp|mlp/shared)/down",)

    def rescales_input(self, leaf: str) -> bool:
        """Returns whether the input of this site is rescaled: its parameter is then 'input_' + `leaf`."""
        if not self.is_initializing():
            return self.has_variable("params", f"input_{leaf}")
        fields = self.fields_at(self.site_path)
        if len(fields) == 2:
            raise AdapterError(
                f"{self.site_path} matches both `outputs` and `inputs` of {type(self).__name__}: narrow one of them."
            )
        return fields == ["inputs"]


@recordable
class Ia3(Rescaling):
    """(IA)3 (arXiv 2205.05638): y = l * (x W0 + b) at `outputs`, y = (l * x) W0 + b at `inputs`; l is ones at the start.

    l [X] is as wide as the tensor that it rescales. Each stacked expert has its own.

    Attributes:
      outputs: patterns of the projections whose output is rescaled; keys and values by default.
      inputs: patterns of the projections whose input is rescaled; the last one of MLPs by default.

    Raises:
      AdapterError: a path matches both.
    """

    @property
    def of_experts(self) -> bool:
        return True

    @nn.compact
    def __call__(self, site: Adapted, x: jax.Array, *sizes: jax.Array) -> jax.Array:
        if self.rescales_input("scale"):
            return site.base(self._rescaled("input_scale", site, 0, x, *sizes), *sizes)
        return self._rescaled("output_scale", site, 1, site.base(x, *sizes), *sizes)

    def _rescaled(
        self, name: str, site: Adapted, side: int, x: jax.Array, *sizes: jax.Array
    ) -> jax.Array:
        ones = nn.initializers.ones
        if sizes:
            names = (site.base.axes[0], axes.NORM, site.axes[side])
            shape = (site.base.num_experts, 1, x.shape[-1])
            scale_E1X = axes.parameter(self, name, ones, names, shape, self.param_dtype)
            rows_R1 = jnp.ones((len(x), 1), jnp.float32)
            return rescaled(
                x, grouped_matmul(rows_R1, scale_E1X.astype(jnp.float32), *sizes, names=names[1:])
            )
        scale_X = axes.parameter(
            self, name, ones, site.axes[side : side + 1], x.shape[-1:], self.param_dtype
        )
        return rescaled(x, scale_X.reshape((1,) * (x.ndim - 1) + (-1,)))
