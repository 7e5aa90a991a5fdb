"""Feed-forward blocks. Shapes: B batch, T length, D width, F hidden width."""

from collections.abc import Callable

import flax.linen as nn
import jax

from model import axes
from model.config import LayerKind, TransformerConfig
from model.flops import Counted
from model.linear import Dense
from model.protocol import MlpSettings

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


class GatedMlp(Counted):
    """down(act(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202): 'silu' is SwiGLU, 'gelu' GeGLU.

    Attributes:
      config: shared sizes.
      kind: kind of this layer with its depth, for subclasses that read the depth.
      activation: name in ACTIVATIONS.
      use_bias: biases on all three projections.
      dense: factory of the projections.
    """

    config: TransformerConfig
    kind: LayerKind = LayerKind()
    activation: str = "silu"
    use_bias: bool = False
    dense: Callable[..., nn.Module] = Dense

    @property
    def settings(self) -> MlpSettings:
        return MlpSettings(kind=type(self).__name__, gated=True)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        del segments_BT  # every token by itself, padding like any other
        act = activation(self.activation)
        gate_BTF = _project(self, "gate", self.config.mlp_dim, (axes.EMBED, axes.MLP))(x_BTD)
        up_BTF = _project(self, "up", self.config.mlp_dim, (axes.EMBED, axes.MLP))(x_BTD)
        h_BTF = axes.constrain(act(gate_BTF) * up_BTF, axes.BATCH, axes.INNER_LENGTH, axes.ACT_MLP)
        return _project(self, "down", self.config.embed_dim, (axes.MLP, axes.EMBED))(h_BTF)


class Mlp(Counted):
    """down(act(up(x))) (GPT-2, T5 v1.0). Attributes as in GatedMlp."""

    config: TransformerConfig
    kind: LayerKind = LayerKind()
    activation: str = "gelu"
    use_bias: bool = False
    dense: Callable[..., nn.Module] = Dense

    @property
    def settings(self) -> MlpSettings:
        return MlpSettings(kind=type(self).__name__, gated=False)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        del segments_BT  # every token by itself, padding like any other
        act = activation(self.activation)
        h_BTF = act(_project(self, "up", self.config.mlp_dim, (axes.EMBED, axes.MLP))(x_BTD))
        h_BTF = axes.constrain(h_BTF, axes.BATCH, axes.INNER_LENGTH, axes.ACT_MLP)
        return _project(self, "down", self.config.embed_dim, (axes.MLP, axes.EMBED))(h_BTF)


def _project(module, name: str, features: int, names: tuple[str, str]) -> nn.Module:
    return module.dense(
        features=features,
        axes=names,
        use_bias=module.use_bias,
        dtype=module.config.compute_dtype,
        param_dtype=module.config.storage_dtype,
        name=name,
    )
