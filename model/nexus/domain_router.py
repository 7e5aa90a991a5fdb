"""A router that knows what its experts were trained on (Nexus, arXiv 2408.15901, section 3.2).

The logit of an expert is the product of a token's state with a vector of the expert, and that vector is a learned
projection of an embedding of the expert's training data:

  e_i = W2 (silu(W1a d_i) * (W1b d_i)),  logit_i = x . e_i

The embeddings are data, so an expert that is added later brings its own, and the projection, which other domains
have trained, places it among the others.

Shapes: E experts, D width, M width of an embedding of a domain, '...' any leading.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from model import axes
from model.flops import Counted
from model.kernels import matmul
from model.linear import Dense, fan_in_normal
from model.moe.router_scale import down_std


class DomainRouter(Counted):
    """The `router` factory of MoeMlp and MixtureOfAttention, in the place of Dense.

    `domains` [E, M] lies with the parameters and is no parameter (axes.constant). `launch.upcycle` puts
    embeddings of the experts' data there; a model that begins with none has random directions.

    Attributes:
      features: E.
      axes: of a linear router's kernel [D, E]; this router has a gated MLP's kernels instead.
      domain_dim: M.
      logit_std: deviation of the logits of states of unit variance at the start.
      dense: factory of the three projections, called with (features=, axes=, kernel_init=, ...).
      dtype: compute dtype.
      param_dtype: storage dtype.
    """

    features: int
    axes: tuple[str, str]
    domain_dim: int = 1024
    logit_std: float = 0.1
    dense: Callable[..., nn.Module] = Dense
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [..., E] of states [..., D]."""
        shape = (self.features, self.domain_dim)
        domains_EM = axes.constant(self, "domains", random_directions, shape, jnp.float32)
        width = x.shape[-1]
        project = functools.partial(
            self.dense,
            features=width,
            axes=(axes.UNMODELED, axes.EMBED),  # whole on each device these would be gigabytes
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        gate_ED = project(kernel_init=fan_in_normal, name="gate")(domains_EM)
        up_ED = project(kernel_init=fan_in_normal, name="up")(domains_EM)
        down_init = nn.initializers.normal(down_std(self.domain_dim, width, self.logit_std))
        experts_ED = project(kernel_init=down_init, name="down")(jax.nn.silu(gate_ED) * up_ED)
        return matmul.matmul(x.astype(self.dtype), experts_ED.T)

    @nn.nowrap
    def flops_per_token(self, shapes: Mapping[str, Any], *, length: int) -> float:
        """Counts the product with the experts' vectors.

        These are projected once a step for all tokens together: a share that falls with the batch, and is nothing in
        inference.
        """
        return 2.0 * self.features * shapes["down"]["kernel"].shape[-1]


def random_directions(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Vectors [..., M] of length 1, in all directions."""
    drawn = jax.random.normal(key, shape, dtype)
    return drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)


def expert_vectors(router: dict, domains_EM: np.ndarray) -> np.ndarray:
    """e_i [E, D] of a router's parameters {gate, up, down: {kernel}}, float64: what routes without the projection."""
    gate, up, down = (np.asarray(router[x]["kernel"], np.float64) for x in ("gate", "up", "down"))
    domains_EM = np.asarray(domains_EM, np.float64)
    inner = domains_EM @ gate
    return (inner / (1 + np.exp(-inner)) * (domains_EM @ up)) @ down
