"""A mixture of gated MLPs, of which every token uses its `top_k` (Shazeer et al., arXiv 1701.06538; in
the form of Mixtral, arXiv 2401.04088). No token is dropped: experts take as many as are sent to them.

Shapes: B batch, T length, M = B * T tokens, K experts per token, R = M * K rows sorted by expert, E
experts, D width, F hidden width; X in and Y out of a product.
"""

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from model import axes
from model.config import TransformerConfig
from model.linear import Dense
from model.mlp import activation
from model.platform import reference_forms, target_platform

# As linear.fan_in_normal; the experts' axis is no fan-in.
expert_fan_in_normal = nn.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", batch_axis=(0,)
)


@flax.struct.dataclass
class Routes:
    """The experts of each token, and the weights of what they return, float32."""

    experts_MK: jax.Array
    weights_MK: jax.Array


def route(probs_ME: jax.Array, *, top_k: int, renormalise: bool = True) -> Routes:
    """The `top_k` most probable experts; their weights sum to 1 when renormalised."""
    weights_MK, experts_MK = jax.lax.top_k(probs_ME, top_k)
    if renormalise:
        weights_MK = weights_MK / jnp.sum(weights_MK, axis=-1, keepdims=True)
    return Routes(experts_MK=experts_MK, weights_MK=weights_MK)


@flax.struct.dataclass
class Dispatch:
    """Rows by expert: row r is of token order_R[r] // K; rank_R is the inverse permutation."""

    order_R: jax.Array
    rank_R: jax.Array
    sizes_E: jax.Array


def dispatch(experts_MK: jax.Array, num_experts: int) -> Dispatch:
    """Sorts the tokens' choices by expert; tokens of one expert stay in order."""
    experts_R = experts_MK.reshape(-1)
    order_R = jnp.argsort(experts_R, stable=True)
    return Dispatch(
        order_R=order_R,
        rank_R=jnp.argsort(order_R),
        sizes_E=jnp.bincount(experts_R, length=num_experts),
    )


def combine(rows_RD: jax.Array, routes: Routes, plan: Dispatch) -> jax.Array:
    """Sums of the experts' rows by token, weighted in float32, [M, D] in the dtype of the rows."""
    rows_MKD = rows_RD[plan.rank_R].reshape(*routes.weights_MK.shape, -1)
    summed = jnp.einsum("mk,mkd->md", routes.weights_MK, rows_MKD.astype(jnp.float32))
    return summed.astype(rows_RD.dtype)


def grouped_matmul(rows_RX: jax.Array, kernel_EXY: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Products of rows that are sorted by expert with their expert's kernel, [R, Y].

    Accelerators have a kernel for it. On CPU that one multiplies every row with every expert, so the
    rows are laid into blocks of one expert each, padded, for one batched product.
    """
    if target_platform() == "cpu" or reference_forms():
        return _blocked_matmul(rows_RX, kernel_EXY, sizes_E)
    return jax.lax.ragged_dot(rows_RX, kernel_EXY, sizes_E.astype(jnp.int32))


def _blocked_matmul(rows_RX: jax.Array, kernel_EXY: jax.Array, sizes_E: jax.Array) -> jax.Array:
    rows, experts = rows_RX.shape[0], kernel_EXY.shape[0]
    # Half an expert's even share: padding then adds about half the products, and kernels are read
    # about three times each.
    length = max(8, -(-rows // (2 * experts)))
    count = min(rows, rows // length + experts)  # blocks that any sizes can need
    blocks_E = -(-sizes_E // length)
    ends_E, block_ends_E = jnp.cumsum(sizes_E), jnp.cumsum(blocks_E)
    expert_R = jnp.searchsorted(ends_E, jnp.arange(rows), side="right")
    in_expert_R = jnp.arange(rows) - (ends_E - sizes_E)[expert_R]
    slot_R = (block_ends_E - blocks_E)[expert_R] * length + in_expert_R
    padded = jnp.zeros((count * length, rows_RX.shape[1]), rows_RX.dtype)
    padded = padded.at[slot_R].set(rows_RX, unique_indices=True)
    # Blocks that are not needed hold zeros: any expert serves them.
    expert_of_block = jnp.searchsorted(block_ends_E, jnp.arange(count), side="right")
    kernels = kernel_EXY[jnp.minimum(expert_of_block, experts - 1)]
    out = jnp.einsum("bcx,bxy->bcy", padded.reshape(count, length, -1), kernels)
    return out.reshape(count * length, -1)[slot_R]


class ExpertDense(nn.Module):
    """y = x @ kernel[e] for rows sorted by expert, with a kernel [E, in, out].

    Attributes:
      num_experts: E.
      features: output width.
      axes: logical names of the kernel's three dimensions.
      kernel_init: initialiser of the kernel.
      dtype: compute dtype.
      param_dtype: storage dtype.
    """

    num_experts: int
    features: int
    axes: tuple[str, str, str]
    kernel_init: Callable = expert_fan_in_normal
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, rows_RX: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return self.product(rows_RX.astype(self.dtype), sizes_E)

    def product(self, rows_RX: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """rows @ kernel[e]; what factorised or adapted experts compute otherwise."""
        shape = (self.num_experts, rows_RX.shape[-1], self.features)
        kernel = axes.parameter(
            self, "kernel", self.kernel_init, self.axes, shape, self.param_dtype
        )
        return grouped_matmul(rows_RX, kernel.astype(self.dtype), sizes_E)


class MoeMlp(nn.Module):
    """sum over the token's experts e of weight_e * down_e(act(gate_e(x)) * up_e(x)).

    The probabilities of the experts are sown as `router_probs` [B, T, E] into the collection
    'intermediates'.

    Attributes:
      config: shared sizes; mlp_dim is the hidden width of one expert.
      num_experts: E.
      top_k: K, experts per token.
      activation: name in mlp.ACTIVATIONS.
      renormalise: the weights of the chosen experts sum to 1, else they are their probabilities.
      dense: factory of the router's projection, computed in float32.
      expert_dense: factory of the experts' three projections.

    Raises:
      ValueError: more experts per token than there are.
    """

    config: TransformerConfig
    num_experts: int = 8
    top_k: int = 2
    activation: str = "silu"
    renormalise: bool = True
    dense: Callable[..., nn.Module] = Dense
    expert_dense: Callable[..., nn.Module] = ExpertDense

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"MoeMlp.top_k = {self.top_k} must lie between 1 and num_experts = {self.num_experts}."
            )
        config, act = self.config, activation(self.activation)
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_ME = self.dense(
            features=self.num_experts,
            axes=(axes.EMBED, axes.EXPERT),
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=config.storage_dtype,
            name="router",
        )(x_MD)
        probs_ME = jax.nn.softmax(logits_ME, axis=-1)
        self.sow("intermediates", "router_probs", probs_ME.reshape(*x_BTD.shape[:-1], -1))
        routes = route(probs_ME, top_k=self.top_k, renormalise=self.renormalise)
        plan = dispatch(routes.experts_MK, self.num_experts)
        rows_RD = x_MD[plan.order_R // self.top_k]
        gate_RF = self._experts("gate", config.mlp_dim, axes.EMBED, axes.MLP)(rows_RD, plan.sizes_E)
        up_RF = self._experts("up", config.mlp_dim, axes.EMBED, axes.MLP)(rows_RD, plan.sizes_E)
        down = self._experts("down", config.embed_dim, axes.MLP, axes.EMBED)
        out_MD = combine(down(act(gate_RF) * up_RF, plan.sizes_E), routes, plan)
        return out_MD.reshape(x_BTD.shape)

    def _experts(self, name: str, features: int, *names: str) -> nn.Module:
        return self.expert_dense(
            num_experts=self.num_experts,
            features=features,
            axes=(axes.EXPERT, *names),
            dtype=self.config.compute_dtype,
            param_dtype=self.config.storage_dtype,
            name=name,
        )
