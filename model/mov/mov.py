"""MoV, a mixture of (IA)3 vectors (arXiv 2309.05444): y * sum_n s_n(x) l_n, with the vectors l_n averaged first.

In a gated MLP the product of both branches is rescaled, and the router reads the branch with the activation, as in the
paper's code. Each stacked expert of a mixture model has vectors and a router of its own.

All vectors are ones at the start. The gradient of the router is then zero, and the vectors move apart only because the
router's own values are random.

Shapes: N experts of the mixture, X width of the rescaled tensor, in H heads of K; at E stacked experts of the model R rows;
'...' leading dimensions.
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
from espalier.model.moe.grouped_matmul import grouped_matmul
from espalier.model.mov.router import Routed


@recordable
class Mov(Routed, Ia3):
    """MoV (arXiv 2309.05444): (IA)3 with `num_experts` vectors per site, of which a router makes a weighted sum for each token.

    The rescaled tensor is [..., X]. At keys and values each head has router weights of its own. `outputs` and `inputs` are
    those of `Ia3`; `Routed` in model/mov/router.py describes the router's attributes.

    Raises:
      AdapterError: a path matches both `outputs` and `inputs`, or the router's settings contradict each other.
    """

    MATRICES: ClassVar[tuple[str, ...]] = ("input_scales", "output_scales")

    @nn.compact
    def __call__(self, site: Adapted, x: jax.Array, *sizes: jax.Array) -> jax.Array:
        if self.num_experts == 1:
            return super().__call__(site, x, *sizes)
        if self.rescales_input("scales"):
            return site.base(self._mixed("input_scales", site, 0, x, *sizes), *sizes)
        return self._mixed("output_scales", site, 1, site.base(x, *sizes), *sizes)

    def _mixed(
        self, name: str, site: Adapted, side: int, x: jax.Array, *sizes: jax.Array
    ) -> jax.Array:
        axis, count = site.axes[side], self.num_experts
        if sizes:
            return self._mixed_at_experts(name, site, side, x, *sizes)
        heads = site.heads if side else 1
        ones, names = nn.initializers.ones, (axes.NORM, axis)
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

    def _mixed_at_experts(
        self, name: str, site: Adapted, side: int, x_RX: jax.Array, sizes: jax.Array
    ) -> jax.Array:
        """Returns rows, sorted by expert, rescaled by the vectors of their expert, which its own router mixes."""
        axis, ones = site.axes[side], nn.initializers.ones
        names = (site.base.axes[0], axes.NORM, axis)
        shape = (site.base.num_experts, self.num_experts, x_RX.shape[-1])
        scales_ENX = axes.parameter(self, name, ones, names, shape, self.param_dtype)
        read = x_RX if side or site.gate is None else site.gate
        weights_RN = self.weights(site, read, axis, sizes)
        return rescaled(
            x_RX, grouped_matmul(weights_RN, scales_ENX.astype(jnp.float32), sizes, names=names[1:])
        )
