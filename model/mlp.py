"""Feed-forward blocks. Shapes: B batch, T length, D width, F hidden width."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import Decay, recordable
from espalier.model import axes
from espalier.model.config import LayerKind, TransformerConfig
from espalier.model.flops import Counted
from espalier.model.kernels.platform import reference_forms, target_platform
from espalier.model.linear import Dense, dropped
from espalier.model.protocol import MlpSettings

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: nn.gelu(x, approximate=False),
    "relu": nn.relu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns an activation without parameters.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {name!r}: choose from {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def xielu(module: nn.Module) -> Callable[[jax.Array], jax.Array]:
    """Returns xIELU (arXiv 2411.13010) with two trained parameters in `module`, computed in float32.

    p x^2 + b x for x > 0, and n (exp(min(x, e)) - 1 - x) + b x elsewhere, where p = softplus(alpha_p) and
    n = b + softplus(alpha_n) are 0.8 at the start; b = 0.5 and e = -1e-6 are stored, and not trained.
    """

    def inverse_softplus(value: float) -> Callable[..., jax.Array]:
        return nn.initializers.constant(math.log(math.expm1(value)))

    dtype = module.config.storage_dtype
    alphas = {"alpha_p": inverse_softplus(0.8), "alpha_n": inverse_softplus(0.3)}
    p, n = (
        jax.nn.softplus(
            axes.parameter(module, name, init, (axes.UNMODELED,), (1,), dtype).astype(jnp.float32)
        )
        for name, init in alphas.items()
    )
    b, e = (
        axes.constant(module, name, nn.initializers.constant(value), (1,), dtype).astype(p.dtype)
        for name, value in (("beta", 0.5), ("eps", -1e-6))
    )

    def apply(x: jax.Array) -> jax.Array:
        x32, rest = x.astype(jnp.promote_types(x.dtype, jnp.float32)), (1,) * (x.ndim - 1)
        p_, n_, b_, e_ = (value.reshape(*rest, 1) for value in (p, n, b, e))
        below = (b_ + n_) * (jnp.expm1(jnp.minimum(x32, e_)) - x32)
        return (jnp.where(x32 > 0, p_ * x32 * x32, below) + b_ * x32).astype(x.dtype)

    return apply


# Activations with parameters, made by a function of the module that holds them.
LEARNED: dict[str, Callable[[nn.Module], Callable[[jax.Array], jax.Array]]] = {"xielu": xielu}


class _Mlp(Counted):
    """Fields of both MLPs.

    Attributes:
      activation: name in ACTIVATIONS or LEARNED.
      use_bias: biases on all projections.
      dense: factory of the projections.
      dropout: share of the hidden values that training drops before the last projection.
      adapters: factory that wraps each of them, called with (projection, layer_input=, gate=), or None; see
        model/adapters/adapter.py.
    """

    gated: ClassVar[bool]

    config: TransformerConfig
    kind: LayerKind = LayerKind()
    activation: str = "silu"
    use_bias: bool = False
    dense: Callable[..., nn.Module] = Dense
    dropout: Decay = 0.0
    adapters: Callable[..., Any] | None = None

    @property
    def settings(self) -> MlpSettings:
        kind = type(self).__name__
        return MlpSettings(kind=kind, gated=self.gated, adapters=self.adapters)

    def _activation(self) -> Callable[[jax.Array], jax.Array]:
        learned = LEARNED.get(self.activation)
        return activation(self.activation) if learned is None else learned(self)

    def _inward(self, name: str, x_BTD: jax.Array) -> jax.Array:
        return self._project(name, self.config.mlp_dim, axes.EMBED, axes.MLP, x_BTD)(x_BTD)

    def _down(
        self, h_BTF: jax.Array, x_BTD: jax.Array, gate_BTF: jax.Array | None = None
    ) -> jax.Array:
        h_BTF = axes.constrain(h_BTF, axes.BATCH, axes.INNER_LENGTH, axes.ACT_MLP)
        h_BTF = dropped(self, h_BTF, self.dropout)
        width = self.config.embed_dim
        return self._project("down", width, axes.MLP, axes.EMBED, x_BTD, gate_BTF)(h_BTF)

    def _project(
        self,
        name: str,
        features: int,
        inward: str,
        outward: str,
        x_BTD: jax.Array,
        gate_BTF: jax.Array | None = None,
    ) -> Any:
        dense = self.dense(
            features=features,
            axes=(inward, outward),
            use_bias=self.use_bias,
            dtype=self.config.compute_dtype,
            param_dtype=self.config.storage_dtype,
            name=name,
        )
        if self.adapters is None:
            return dense
        return self.adapters(dense, layer_input=x_BTD, gate=gate_BTF)


@recordable
class GatedMlp(_Mlp):
    """A gated MLP, x [B, T, D] -> down(act(gate(x)) * up(x)) [B, T, D] (Shazeer, arXiv 2002.05202).

    `activation` 'silu' makes it SwiGLU, 'gelu' GeGLU. The hidden width is config.mlp_dim; `Mlp` has the same attributes.

    Attributes:
      activation: name in ACTIVATIONS or LEARNED.
      use_bias: whether projections have biases.
      dense: factory of the projections.
      dropout: share of the hidden values that training drops before the last projection.
      adapters: factory that wraps each projection; None for no adapters (model/adapters/adapter.py).
    """

    gated: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        del segments_BT  # every token by itself, padding like any other
        act = self._activation()
        gate_BTF, up_BTF = self._inward("gate", x_BTD), self._inward("up", x_BTD)
        return self._down(_gated(act, gate_BTF, up_BTF), x_BTD, act(gate_BTF))


def _gated(
    act: Callable[[jax.Array], jax.Array], gate_BTF: jax.Array, up_BTF: jax.Array
) -> jax.Array:
    """Returns act(gate) * up. On CPUs XLA would keep parts of the activation for the backward pass; they are computed again."""

    def product(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
        return act(gate_BTF) * up_BTF

    again = target_platform() == "cpu" and not reference_forms()
    return (jax.checkpoint(product) if again else product)(gate_BTF, up_BTF)


@recordable
class Mlp(_Mlp):
    """An MLP without a gate, x [B, T, D] -> down(act(up(x))) [B, T, D] (GPT-2, T5 v1.0).

    The hidden width is config.mlp_dim; the other attributes are described in `GatedMlp`.

    Attributes:
      activation: name in ACTIVATIONS or LEARNED.
    """

    gated: ClassVar[bool] = False

    activation: str = "gelu"

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        del segments_BT  # every token by itself, padding like any other
        act = self._activation()
        return self._down(act(self._inward("up", x_BTD)), x_BTD)


@recordable
def by_kind(
    *,
    config: TransformerConfig,
    kind: LayerKind,
    name: str | None,
    others: Callable[..., nn.Module] = GatedMlp,
    **named: Callable[..., nn.Module],
) -> nn.Module:
    """Returns a layer's MLP, in models whose layers have several kinds, such as dense layers before mixtures.

    Args:
      config: shared sizes.
      kind: the layer's kind.
      name: name of the module.
      others: factory of the MLP of layers whose kind names none.
      named: factories of the MLPs that kinds name: 'dense' of the kind 'full:dense' in `TransformerConfig.layer_pattern`.

    Raises:
      ValueError: a kind names an MLP without a factory.
    """
    # Without the name, which has had its effect; a block refuses a name that has none.
    plain = dataclasses.replace(kind, mlp="")
    if not kind.mlp:
        return others(config=config, kind=plain, name=name)
    if kind.mlp not in named:
        known = ", ".join(map(repr, sorted(named))) or "none"
        raise ValueError(
            f"layer_pattern names the MLP {kind.mlp!r}, which mlp.by_kind does not have: it has {known}. "
            f"Bind mlp.by_kind.{kind.mlp}."
        )
    return named[kind.mlp](config=config, kind=plain, name=name)
