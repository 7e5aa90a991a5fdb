"""A router that is a gated MLP of the token: a control with as many parameters as a projection router.

Shapes: E experts, D width, M width of an embedding of a domain, F hidden width, '...' any leading.
"""

import functools

import flax.linen as nn
import jax

from espalier.common.ranges import recordable
from espalier.model import axes
from espalier.model.linear import fan_in_normal
from espalier.model.nexus.domain_router import GatedRouter, token_down_std


@recordable
class MlpRouter(GatedRouter):
    """A router with logits down(silu(gate(x)) * up(x)), for MoeMlp and MixtureOfAttention.

    Its hidden width is F = M + D / 2, so `gate` and `up` [D, F] have the 2 D M + D^2 parameters of a
    domain_router.DomainRouter; `down` [F, E] corresponds to a linear router's kernel.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits [..., E] of states [..., D]."""
        hidden = self.domain_dim + x.shape[-1] // 2
        project = functools.partial(self.dense, dtype=self.dtype, param_dtype=self.param_dtype)
        inward = functools.partial(
            project,
            features=hidden,
            axes=(self.axes[0], axes.MLP),
            kernel_init=fan_in_normal,
        )
        gate, up = inward(name="gate")(x), inward(name="up")(x)
        down_init = nn.initializers.normal(token_down_std(hidden, self.logit_std))
        last = (axes.MLP, self.axes[1])
        down = project(features=self.features, axes=last, kernel_init=down_init, name="down")
        return down(jax.nn.silu(gate) * up)
