"""Feed-forward blocks. Shapes: B batch, T length, D width, F hidden width."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax

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
    if name not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {name!r}: choose from {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


class _Mlp(Counted):
    """Fields of both MLPs.

    Attributes:
      activation: name in ACTIVATIONS.
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
    """down(act(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202): 'silu' is SwiGLU, 'gelu' GeGLU."""

    gated: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        del segments_BT  # every token by itself, padding like any other
        act = activation(self.activation)
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
    """down(act(up(x))) (GPT-2, T5 v1.0)."""

    gated: ClassVar[bool] = False

    activation: str = "gelu"

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        del segments_BT  # every token by itself, padding like any other
        act = activation(self.activation)
        return self._down(act(self._inward("up", x_BTD)), x_BTD)
