"""MoV, a mixture of (IA)3 vectors (arXiv 2309.05444): y * sum_n s_n(x) l_n, with the vectors l_n averaged first.

In a gated MLP the product of both branches is rescaled, and the router reads the branch with the activation, as in the
paper's code.

All vectors are ones at the start. The gradient of the router is then zero, and the vectors move apart only because the
router's own values are random.

Shapes: N experts, X width of the rescaled tensor, in H heads of K; '...' leading dimensions.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import recordable
from espalier.model import axes
from espalier.model.adapters.adapter import Adapted, rescaled
from espalier.model.adapters.ia3 import Ia3
from espalier.model.kernels import matmul
from espalier.model.mov.router import Routed


@recordable
class Mov(Routed, Ia3):
    """(IA)3 with `num_experts` vectors, mixed for each token, and at keys and values for each head."""

    MATRICES: ClassVar[tuple[str, ...]] = ("input_scales", "output_scales")

    @property
    def of_experts(self) -> bool:
        return self.num_experts == 1

    @nn.compact
    def __call__(self, site: Adapted, x: jax.Array, *sizes: jax.Array) -> jax.Array:
        if self.num_experts == 1:
            return super().__call__(site, x, *sizes)
        if self.rescales_input("scales"):
            return site.base(self._mixed("input_scales", site, 0, x))
        return self._mixed("output_scales", site, 1, site.base(x))

    def _mixed(self, name: str, site: Adapted, side: int, x: jax.Array) -> jax.Array:
        axis, count = site.axes[side], self.num_experts
        heads = site.heads if side else 1
        ones, names = nn.initializers.ones, (axes.UNMODELED, axis)
        scales_NX = axes.parameter(self, name, ones, names, (count, x.shape[-1]), self.param_dtype)
        scales_NHK = scales_NX.astype(jnp.float32).reshape(count, heads, -1)
        parts = x.reshape(*x.shape[:-1], heads, -1)
        own = self.router_input == "site_tensor"
        of_head = axes.HEAD_DIM if heads > 1 else axis
        read = parts if side or site.gate is None else site.gate[..., None, :]
        weights = self.weights(site, read, of_head)
        weights = weights if own else weights[..., None, :]
        weights = jnp.broadcast_to(weights, (*weights.shape[:-2], heads, count))
        # Heads lead: XLA's batched product is slow where they follow the rows.
        weights, scales_HNK = jnp.moveaxis(weights, -2, 0), scales_NHK.swapaxes(0, 1)
        scale = jnp.moveaxis(jax.vmap(matmul.matmul)(weights, scales_HNK), 0, -2)
        return rescaled(parts, scale).reshape(x.shape)
