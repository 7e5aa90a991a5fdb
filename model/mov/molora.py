"""MoLORA, a mixture of LoRA experts (arXiv 2309.05444): y + s sum_n p_n(x) x A_n B_n.

The mixture is computed in the space of ranks: the products x A_n are multiplied by the experts' weights, and one product
with all B_n adds them up. This equals averaging the experts' matrices A_n B_n first. Averaging A and B separately would
not: it mixes every A_n with every B_m.

Shapes: N experts, X in, Y out, R rank, '...' leading dimensions.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from espalier.common.ranges import Size, recordable
from espalier.model import axes
from espalier.model.adapters.adapter import Adapted, AdapterError
from espalier.model.adapters.lora import Lora
from espalier.model.kernels import matmul
from espalier.model.mov.router import Routed


@recordable
class MoLora(Routed, Lora):
    """LoRA with `num_experts` pairs of factors, mixed for each token.

    The default layers are the paper's: attention and, of a gated MLP, the branch with the activation and the last projection.

    Raises:
      AdapterError: `dora` with several experts.
    """

    layers: Sequence[str] = (r"(.*/)?\w*attention/(query|key|value|out)", r"(.*/)?mlp/(gate|down)")
    rank: Size = 4
    a_init: Callable[..., jax.Array] = nn.initializers.normal(0.02)

    @property
    def of_experts(self) -> bool:
        return self.num_experts == 1

    @nn.compact
    def __call__(self, site: Adapted, x: jax.Array, *sizes: jax.Array) -> jax.Array:
        if self.num_experts == 1:
            return super().__call__(site, x, *sizes)
        if self.dora:
            raise AdapterError(
                f"{self.site_path}: DoRA renormalises one matrix, and here every token has its own mixture: set dora = False, "
                "or num_experts = 1."
            )
        y = site.base(x)
        a_NXR, b_NRY = self.factors(site, x.shape[-1], y.shape[-1], self.num_experts)
        weights = self.weights(site, x, site.axes[0]).astype(y.dtype)
        count, inputs, rank = a_NXR.shape
        a = a_NXR.astype(y.dtype).swapaxes(0, 1).reshape(inputs, count * rank)
        inner = matmul.matmul(self._dropped(x).astype(y.dtype), a)
        inner = inner.reshape(*inner.shape[:-1], count, rank) * weights[..., None]
        inner = inner.reshape(*x.shape[:-1], -1) * self.scale(rank)
        return y + matmul.matmul(inner, b_NRY.astype(y.dtype).reshape(count * rank, -1))

    @nn.nowrap
    def _stack_axes(self, site: Adapted) -> tuple[str, ...]:
        if self.num_experts == 1:
            return super()._stack_axes(site)
        return (axes.UNMODELED,)
