"""MoLORA, a mixture of LoRA experts (arXiv 2309.05444): y + s sum_n p_n(x) x A_n B_n.

The mixture is computed in the space of ranks: the products x A_n are multiplied by the experts' weights, and one product
with all B_n adds them up. This equals averaging the experts' matrices A_n B_n first. Averaging A and B separately would
not: it mixes every A_n with every B_m.

Shapes: N experts of the mixture, X in, Y out, R rank, '...' leading dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import Size, recordable
from espalier.model import axes
from espalier.model.adapters.adapter import Adapted, AdapterError
from espalier.model.adapters.lora import Lora
from espalier.model.kernels import matmul
from espalier.model.moe.grouped_matmul import grouped_matmul
from espalier.model.mov.router import Routed


@recordable
def small_normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Returns values of a normal distribution with a standard deviation of 0.02."""
    return nn.initializers.normal(0.02)(key, shape, dtype)


@recordable
class MoLora(Routed, Lora):
    """LoRA with `num_experts` pairs of factors, mixed for each token by a router (MoLORA, arXiv 2309.05444).

    The input [..., X] gives an output [..., Y]. Each stacked expert of a mixture model has factors and a router of its own.
    The default layers are the paper's: attention and, of a gated MLP, the branch with the activation and the last projection.
    `Lora` describes the attributes of the factors, `Routed` in model/mov/router.py those of the router.

    Raises:
      AdapterError: `dora` with several experts, a rank above the matrix's smaller side, or settings of the router that
        contradict each other.
    """

    layers: Sequence[str] = (r"(.*/)?\w*attention/(query|key|value|out)", r"(.*/)?mlp/(gate|down)")
    rank: Size = 4
    a_init: Callable[..., jax.Array] = small_normal

    @nn.compact
    def __call__(self, site: Adapted, x: jax.Array, *sizes: jax.Array) -> jax.Array:
        if self.num_experts == 1:
            return super().__call__(site, x, *sizes)
        if self.dora:
            raise AdapterError(
                f"{self.site_path}: DoRA renormalises one matrix, and here every token has its own mixture: set dora = False, "
                "or num_experts = 1."
            )
        y = site.base(x, *sizes)
        product = grouped_matmul if sizes else matmul.matmul
        experts = (site.base.num_experts,) if sizes else ()
        stacked = (*experts, self.num_experts)
        a, b = self.factors(site, x.shape[-1], y.shape[-1], *stacked)
        weights = self.weights(site, x, site.axes[0], *sizes).astype(y.dtype)
        *_, count, inputs, rank = a.shape
        a = a.astype(y.dtype).swapaxes(-3, -2).reshape(*experts, inputs, count * rank)
        inner = product(self._dropped(x).astype(y.dtype), a, *sizes)
        inner = inner.reshape(*inner.shape[:-1], count, rank) * weights[..., None]
        inner = inner.reshape(*x.shape[:-1], -1) * self.scale(rank)
        b = b.astype(y.dtype).reshape(*experts, count * rank, -1)
        return y + product(inner, b, *sizes)

    @nn.nowrap
    def _stack_axes(self, site: Adapted) -> tuple[str, ...]:
        of_experts = super()._stack_axes(site)
        if self.num_experts == 1:
            return of_experts
        at_experts = hasattr(site.base, "num_experts")
        return (*(of_experts if at_experts else ()), axes.UNMODELED)
