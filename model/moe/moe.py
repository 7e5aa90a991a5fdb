"""A mixture of gated MLPs: every token uses `top_k` of them (Shazeer et al., arXiv 1701.06538).

The defaults are Mixtral's (arXiv 2401.04088). model/moe/routing.py scores and chooses experts, and sends tokens to
them; on a mesh, model/moe/parallel.py does.

Shapes: B batch, T length, K experts per token, R rows sorted by expert, E experts, D width, F hidden width;
X in and Y out of a product.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import (
    NonNegative,
    Positive,
    Size,
    check_choice,
    recordable,
    refuse_set,
)
from espalier.model import axes
from espalier.model.config import LayerKind, TransformerConfig
from espalier.model.flops import Counted, weights
from espalier.model.kernels import int8, taps
from espalier.model.like import OWN, like
from espalier.model.linear import Dense
from espalier.model.mlp import GatedMlp, activation
from espalier.model.moe import parallel, routing, row_blocks
from espalier.model.moe.grouped_matmul import grouped_matmul, scaled_matmul
from espalier.model.moe.parallel import Placement
from espalier.model.moe.routing import Routes, Scores, route
from espalier.model.protocol import MlpSettings

# As linear.fan_in_normal; the axis of experts does not count as fan-in.
expert_fan_in_normal = nn.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", batch_axis=(0,)
)

Combination = Literal["sum", "average"]


@recordable
class ExpertDense(nn.Module):
    """y = x @ kernel[e] for rows sorted by expert, with a kernel [E, in, out].

    Attributes:
      num_experts: E.
      axes: logical names of the kernel's three dimensions.
    """

    num_experts: Size
    features: Size
    axes: tuple[str, str, str]
    kernel_init: Callable = expert_fan_in_normal
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, rows_RX: jax.Array, sizes_E: jax.Array | None) -> jax.Array:
        """Returns y for rows of these sizes; with None, the kernel, for a caller that multiplies by it."""
        if sizes_E is None:
            return self.kernel(rows_RX.shape[-1])
        return self.product(rows_RX.astype(self.dtype), sizes_E)

    def product(self, rows_RX: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """Returns rows @ kernel[e]; factorised and adapted experts override it."""
        kernel_EXY, scale_EY = self.kernel(rows_RX.shape[-1]), int8.scale_of(self)
        names = self.axes[1:]
        if scale_EY is not None:
            return scaled_matmul(rows_RX, kernel_EXY, scale_EY, sizes_E, names=names)
        y_RY = grouped_matmul(rows_RX, kernel_EXY, sizes_E, names=names)
        return taps.projection(self, "kernel", rows_RX, y_RY, sizes=sizes_E)

    def kernel(self, inputs: int) -> jax.Array:
        """Returns the kernel [E, inputs, features] in the dtype of products, or int8."""
        shape = (self.num_experts, inputs, self.features)
        parts = (self.kernel_init, self.axes, shape, self.param_dtype)
        kernel_EXY = axes.parameter(self, "kernel", *parts)
        return kernel_EXY if kernel_EXY.dtype == jnp.int8 else kernel_EXY.astype(self.dtype)


@recordable
class MoeMlp(Counted):
    """sum over the token's experts e of weight_e * down_e(act(gate_e(x)) * up_e(x)), plus shared(x).

    The probabilities of the experts (`routing.Scores`) are sown as `router_probs` [B, T, E] into the collection
    'intermediates', auxiliary losses into 'losses', and `routing.statistics` into 'metrics'. Padding is
    not sent to experts and does not count in losses or statistics. Without an rng 'dropout', that is outside of
    training, both factors are None: what a token gets depends neither on its batch nor on later tokens.

    Attributes:
      config: shared sizes.
      kind: kind of this layer with its depth; also passed to `shared`.
      num_experts: E, without the shared expert.
      top_k: K, experts per token; E for all of them, weighted by their scores (soft routing).
      expert_dim: F, the hidden width of one expert; None for the config's mlp_dim.
      activation: name in mlp.ACTIVATIONS.
      score: what makes scores of the router's logits: 'softmax' over all experts, or 'sigmoid' of each (DeepSeek-V3,
        Cohere2-MoE).
      renormalise: whether the scores of the chosen experts are divided by their sum; otherwise they are the weights.
      routed_scale: factor on the weighted sum of the experts (DeepSeek-V3's routed_scaling_factor).
      balance_loss: weight of routing.balance_loss, of each microbatch by itself.
      router_z_loss: weight of routing.z_loss, which is of a softmax.
      balance_bias: whether biases are added to the scores where experts are chosen, see routing.choice_bias. They are
        0 at first; trainers/optim/balance_bias.py moves them by the choices that are sown into 'counts'.
      capacity_factor: in training, an expert processes at most this many times an even share of a row's real
        tokens: the first ones (GShard, arXiv 2006.16668, with a row as the group; documents that are packed into
        one row share it). It adds nothing to other tokens. None for no limit (dropless). See routing.place_in_line.
      exchange_factor: in training, a device sends to each other device at most this many times an even share of
        its choices: the first ones. None for no limit; buffers are then larger than an even share by the number
        of devices with experts. No effect if experts are not split.
      router: factory of the router's projection, computed in float32.
      expert_dense: factory of the experts' three projections.
      adapters: factory that wraps each of them, called with (projection, layer_input=, gate=), or None; see
        model/adapters/adapter.py.
      shared: factory of an MLP that all tokens use with weight 1 (Nexus, arXiv 2408.15901), called with
        (config=, kind=, name=), or None.
      shared_experts: how many experts are shared: they are one MLP of so many times an expert's width.
      combine_shared: 'sum' of the shared and the routed experts, or their 'average', (routed + shared) / 2 (Cohere2-MoE).

    Raises:
      ValueError: `top_k` is not in [1, num_experts], a factor is not positive, a choice is unknown, or an option has no
        effect or no meaning with another one.
    """

    config: TransformerConfig
    kind: LayerKind = LayerKind()
    num_experts: Size = 8
    top_k: Size = 2
    expert_dim: Size | None = None
    activation: str = "silu"
    score: routing.Score = "softmax"
    renormalise: bool = True
    routed_scale: Positive = 1.0
    balance_loss: NonNegative = 0.0
    router_z_loss: NonNegative = 0.0
    balance_bias: bool = False
    capacity_factor: Positive | None = None
    exchange_factor: Positive | None = None
    router: routing.Router = Dense
    expert_dense: Callable[..., nn.Module] = ExpertDense
    adapters: Callable[..., Any] | None = None
    shared: Callable[..., nn.Module] | None = None
    shared_experts: Size = 1
    combine_shared: Combination = "sum"

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        """Returns [B, T, D]; with the rng 'dropout', within the limits of training."""
        self._check()
        scores = routing.scored(self, x_BTD, self.score)
        real_BT = routing.real_tokens(x_BTD, segments_BT)
        # A tap needs the rows of all devices in one order.
        place = (
            None
            if taps.is_active()
            else parallel.placement(len(x_BTD), self.num_experts, self.width)
        )
        choose: Callable[..., Any] = functools.partial(self._choose, place=place)
        if place is not None:  # without this, XLA would gather all scores to sort them
            choose = place.map(choose, *(place.split,) * 3)
        routes, experts_BTK = choose(scores.scores_ME, self._order(scores), real_BT)
        kept_BTK = experts_BTK < self.num_experts
        routing.report(self, scores.probs_ME, routes.experts_MK, real_BT, kept_BTK=kept_BTK)
        if self.balance_bias:
            routing.count_choices(self, routes.experts_MK, self.num_experts, real_BT)
        if self.router_z_loss:
            z_loss = routing.z_loss(scores.logits_ME, real_BT)
            self.sow("losses", "router_z", self.router_z_loss * z_loss)
        out_BTD = self._mix(x_BTD, experts_BTK, routes.weights_MK, place)
        if self.shared is not None:
            out_BTD = out_BTD + self._shared()(x_BTD, segments_BT=segments_BT)
            if self.combine_shared == "average":
                out_BTD = out_BTD / 2
        return out_BTD

    @property
    def settings(self) -> MlpSettings:
        return MlpSettings(
            kind=type(self).__name__,
            gated=True,
            experts=self.num_experts,
            top_k=self.top_k,
            router=routing.router_of(self, parent=None),
            adapters=self.adapters,
        )

    @nn.nowrap
    def flops_per_token(self, shapes: Mapping[str, Any], *, length: int) -> float:
        """Counts the router, the shared expert and `top_k` experts, even if capacity drops choices."""
        total = routing.router_of(self).flops_per_token(shapes["router"], length=length)
        if self.shared is not None:
            total += self._shared().flops_per_token(shapes["shared"], length=length)
        experts = {name: shapes[name] for name in ("gate", "up", "down")}
        return total + 2.0 * weights(experts) * self.top_k / self.num_experts

    @nn.nowrap
    def _shared(self) -> Any:
        assert self.shared is not None
        width = self.width * self.shared_experts
        config = dataclasses.replace(self.config, mlp_dim=width)
        return self.shared(config=config, kind=self.kind, name="shared")

    @property
    def width(self) -> int:
        """F, the hidden width of one expert."""
        return self.expert_dim or self.config.mlp_dim

    def _order(self, scores: Scores) -> jax.Array | None:
        """Returns what experts are chosen by, see `route`."""
        if self.balance_bias:
            bias_E = routing.choice_bias(self, self.num_experts)
            return scores.scores_ME + bias_E.reshape(1, 1, -1)
        return scores.logits_ME if self.score == "sigmoid" else None

    def _choose(
        self,
        scores_BTE: jax.Array,
        order_BTE: jax.Array | None,
        real_BT: jax.Array,
        *,
        place: Placement | None,
    ) -> tuple[Routes, jax.Array]:
        """Returns the tokens' routes and experts [B, T, K]; E for padding and choices beyond capacity."""
        routes = route(
            scores_BTE, top_k=self.top_k, renormalise=self.renormalise, order_ME=order_BTE
        )
        if self.routed_scale != 1.0:
            routes = Routes(routes.experts_MK, self.routed_scale * routes.weights_MK)
        experts_BTK = jnp.where(real_BT[..., None], routes.experts_MK, self.num_experts)
        if self._limit("capacity_factor") is not None:
            by_count = [self._capacity(n) for n in range(real_BT.shape[1] + 1)]
            most_B11 = jnp.asarray(by_count)[real_BT.sum(1)][:, None, None]
            experts_BTK = routing.first_in_line(experts_BTK, most_B11, none=self.num_experts)
        limited = self._limit("exchange_factor") is not None
        if limited and place is not None and place.expert_shards > 1:
            most = self._exchanged(experts_BTK.size, place)
            experts_BTK = parallel.first_to_one(experts_BTK, most, self.num_experts, place)
        return routes, experts_BTK

    def _mix(
        self,
        x_BTD: jax.Array,
        experts_BTK: jax.Array,
        weights_BTK: jax.Array,
        place: Placement | None,
    ) -> jax.Array:
        """Returns the weighted sum of the experts' outputs."""
        count, (rows, length, top_k) = self.num_experts, experts_BTK.shape
        gate, up, down = projections = self._projections()
        mlp = functools.partial(_gated, activation(self.activation))
        kernels = None
        if self._only_products(projections):
            x_BTD = x_BTD.astype(self.config.compute_dtype)
            hidden = jax.ShapeDtypeStruct((1, self.width), x_BTD.dtype)
            kernels = (gate(x_BTD, None), up(x_BTD, None), down(hidden, None))
        if place is None:
            most = rows * min(length * top_k, count * self._capacity(length))
            rows_RD, plan = routing.send(x_BTD, experts_BTK, count, rows=most)
            if kernels is not None:
                out_RD = mlp(rows_RD, kernels, plan.sizes_E)
            else:
                with taps.expert_rows(plan.order_R, top_k):
                    out_RD = self._experts(projections, rows_RD, plan.sizes_E)
            return routing.collect(out_RD, weights_BTK, plan)
        # The experts of a token are distinct, so it sends at most `experts` choices to one device.
        rows, experts = rows // place.token_shards, count // place.expert_shards
        most = rows * min(length * min(top_k, experts), experts * self._capacity(length))
        most = min(most, self._exchanged(rows * length * top_k, place))
        if kernels is not None:
            return parallel.mixed(mlp, x_BTD, experts_BTK, weights_BTK, kernels, place, rows=most)
        rows_RD, sizes, exchange = parallel.send(x_BTD, experts_BTK, count, place, rows=most)
        out_RD = self._experts(projections, rows_RD, sizes)
        return parallel.collect(out_RD, weights_BTK, exchange, place)

    def _limit(self, name: str) -> float | None:
        """Returns the factor of this name in training, None outside of it."""
        return getattr(self, name) if self.has_rng("dropout") else None

    def _capacity(self, tokens: int) -> int:
        """Returns how many tokens an expert processes at most of a row with this number of real tokens."""
        factor = self._limit("capacity_factor")
        return (
            tokens if factor is None else math.ceil(factor * tokens * self.top_k / self.num_experts)
        )

    def _exchanged(self, choices: int, place: Placement) -> int:
        """Returns the maximum number of choices that a device sends to one other device."""
        factor = self._limit("exchange_factor")
        return choices if factor is None else math.ceil(factor * choices / place.expert_shards)

    def _projections(self) -> tuple[Any, Any, Any]:
        hidden = (self.width, axes.EMBED, axes.MLP)
        gate, up = (self._expert_dense(name, *hidden) for name in ("gate", "up"))
        return gate, up, self._expert_dense("down", self.config.embed_dim, axes.MLP, axes.EMBED)

    def _only_products(self, projections: tuple[Any, Any, Any]) -> bool:
        """Returns whether nothing but the products with their kernels is to be computed or seen of the projections."""
        # Results of single projections that a caller captures would be kernels.
        seen = taps.is_active() or self.is_mutable_collection("intermediates")
        int8_kernels = int8.SCALE in (self.get_variable("params", "gate") or {})
        plain = all(type(dense) is ExpertDense for dense in projections) and not int8_kernels
        return plain and self.adapters is None and not seen

    def _experts(
        self, projections: tuple[Any, Any, Any], rows_RD: jax.Array, sizes: jax.Array
    ) -> jax.Array:
        gate, up, down = projections
        gate, up = (self._adapted(dense, layer_input=rows_RD) for dense in (gate, up))
        branch_RF = activation(self.activation)(gate(rows_RD, sizes))
        down = self._adapted(down, layer_input=rows_RD, gate=branch_RF)
        return down(branch_RF * up(rows_RD, sizes), sizes)

    def _expert_dense(self, name: str, features: int, *names: str) -> Any:
        return self.expert_dense(
            num_experts=self.num_experts,
            features=features,
            axes=(axes.EXPERT, *names),
            dtype=self.config.compute_dtype,
            param_dtype=self.config.storage_dtype,
            name=name,
        )

    def _adapted(self, dense: Any, **site: Any) -> Any:
        return dense if self.adapters is None else self.adapters(dense, **site)

    def _check(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"MoeMlp.top_k = {self.top_k} must lie between 1 and num_experts = {self.num_experts}."
            )
        if self.score == "sigmoid":
            refuse_set(
                self, ("router_z_loss",), "score = 'sigmoid', whose scores have no common sum"
            )
        check_choice("MoeMlp.combine_shared", self.combine_shared, get_args(Combination))
        if self.shared is None:
            refuse_set(self, ("shared_experts", "combine_shared"), "shared = None")
        for name in ("capacity_factor", "exchange_factor"):
            if (factor := getattr(self, name)) is not None and factor <= 0:
                raise ValueError(
                    f"MoeMlp.{name} = {factor} must be positive; None keeps every choice."
                )


def _gated(
    act: Callable[[jax.Array], jax.Array],
    rows_RD: jax.Array,
    kernels: row_blocks.Kernels,
    sizes_E: jax.Array,
) -> jax.Array:
    """Returns down_e(act(gate_e(x)) * up_e(x)) of every row x with its expert's kernels, [R, D]."""
    if row_blocks.applies():
        return row_blocks.expert_mlp(act, rows_RD, kernels, sizes_E.astype(jnp.int32))
    gate_EDF, up_EDF, down_EFD = kernels
    hidden_RF = act(grouped_matmul(rows_RD, gate_EDF, sizes_E))
    hidden_RF = hidden_RF * grouped_matmul(rows_RD, up_EDF, sizes_E)
    return grouped_matmul(hidden_RF, down_EFD, sizes_E)


@recordable
def experts_of(
    *,
    mlp: Callable[..., Any] = GatedMlp,
    moe: Callable[..., MoeMlp] = MoeMlp,
    granularity: Size = 1,
) -> Callable[..., MoeMlp]:
    """Returns an `mlp` factory that makes mixtures of gated MLPs; each expert has the dense MLP's width.

    Args:
      mlp: factory of one expert; the mixture uses its activation.
      moe: factory of the mixture, called with this activation.
      granularity: in how many parts each expert is split (DeepSeekMoE, arXiv 2401.06066): a mixture has so many times the
        experts of `moe`, of this part of their width, and a token uses so many times as many.

    Raises:
      ValueError: (raised by the returned factory) `mlp` makes a class other than `GatedMlp`, or has settings that experts
        do not have: biases, dropout, or projections or adapters of its own where the mixture has none; or experts cannot be
        split.
    """
    make = like(mlp, moe, of=GatedMlp, own={"dense": "expert_dense", "adapters": "adapters"})
    return make if granularity == 1 else functools.partial(_split, make, granularity)


def _split(make: Callable[..., MoeMlp], parts: int, **passed: Any) -> MoeMlp:
    """Returns the mixture that `make` makes, with each expert in parts."""
    whole = make(**{**passed, "name": None, "parent": None})
    if whole.width % parts:
        raise ValueError(
            f"experts_of.granularity = {parts} does not divide the experts' width, {whole.width}."
        )
    if getattr(routing.router_of(whole, parent=None), "of_data", False):
        raise ValueError(
            f"experts_of.granularity = {parts} splits experts, and this router knows an expert by its data: it would always "
            "choose all parts of an expert together. Use a router of the token alone, such as a linear one, or whole experts."
        )
    finer = {
        "num_experts": parts * whole.num_experts,
        "top_k": parts * whole.top_k,
        "expert_dim": whole.width // parts,
    }
    if whole.shared is not None:
        finer["shared_experts"] = parts * whole.shared_experts
    fields = {x.name: getattr(whole, x.name) for x in dataclasses.fields(whole) if x.init}
    for name in OWN:
        del fields[name]
    return type(whole)(**{**fields, **finer, **passed})
