"""The interface of models that trainers and commands use, besides flax's `init`, `apply` and `clone`.

Every model implements `Model` (model/transformer.py, model/heads/, model/vision/resnet.py); models of tokens also
implement `LanguageModel`. Callers do not probe modules for attributes or build factories to read their fields: a layer
has `settings` and `flops_per_token` (model/flops.py), and a wrapper of a layer forwards them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax

from model.config import LayerKind
from model.kv_cache.base import CacheSizes

Row = Literal["tokens", "inputs_and_targets", "images"]
Output = Literal["logits", "rewards", "classes"]
Arrays = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """Settings of one layer's attention.

    Attributes:
      query_heads: N, the sum over all experts.
      cache_heads: K, the key/value heads that a cache stores.
      experts: E, 0 without a router.
      top_k: number of experts that a token mixes; None for all.
      shared_kv: whether all experts read the same keys and values.
      adapters: the factory of its adapters (model/adapters/adapter.py), or None.
    """

    query_heads: int
    cache_heads: int
    head_dim: int
    experts: int = 0
    top_k: int | None = None
    shared_kv: bool = False
    adapters: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpSettings:
    """Settings of one layer's MLP.

    Attributes:
      kind: name of the class, for messages.
      gated: whether the MLP, or each expert, is down(act(gate) * up).
      experts: E, 0 without a router.
      top_k: number of experts that a token uses.
      adapters: the factory of its adapters (model/adapters/adapter.py), or None.
    """

    kind: str
    gated: bool
    experts: int = 0
    top_k: int = 1
    adapters: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Settings of one layer: its kind (with its depth), attention and MLP."""

    kind: LayerKind
    attention: AttentionSettings
    mlp: MlpSettings


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """A key of caches for a model, whose fields may not be hashable.

    Compares by the identity of an object, not by its fields, and keeps the object alive.
    """

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


class Sizes(Protocol):
    """A model's sizes: a dataclass that is recorded with every checkpoint."""

    def axis_sizes(self) -> Sequence[tuple[str, int, str]]:
        """Returns the sizes that a mesh may split, as (logical axis, size, name of the setting)."""
        ...


@runtime_checkable
class Model(Protocol):
    """Any model.

    `row` is the kind of data in a row of a batch (tokens that a decoder reads, inputs of an encoder with targets, or images), `output` the kind of output for a row: logits or rewards
    of each token, or logits of classes.
    """

    @property
    def config(self) -> Any: ...
    @property
    def row(self) -> Row: ...
    @property
    def output(self) -> Output: ...

    def init(self, *args: Any, **kwargs: Any) -> Any: ...
    def apply(self, *args: Any, **kwargs: Any) -> Any: ...

    def layer_settings(self) -> Sequence[LayerSettings]:
        """Returns the settings of every layer, by depth; an empty sequence unless it is a transformer."""
        ...

    def forward_flops(self, row: Arrays, variables: Any = None) -> float:
        """Returns the FLOPs of a forward pass for one token, inputs and targets alike, or for one image.

        Args:
          row: shapes of a batch of one row by name, as `Inputs.arrays(1)` of trainers/inputs.py.
          variables: the model's variables or their shapes, unboxed; traced if None.
        """
        ...


@runtime_checkable
class LanguageModel(Model, Protocol):
    """A model of tokens.

    Attributes:
      max_length: number of tokens of the longest row that the model can read; None for no limit.
      inference_part: name of the part for inference, without heads that only training uses: an attribute of the model and a
        key of its parameters. '' is the whole model.
    """

    inference_part: ClassVar[str]

    @property
    def max_length(self) -> int | None: ...

    def cache_sizes(self, layer: int) -> CacheSizes:
        """Returns the sizes of the key/value cache of layer `layer`, from 0, for models that generate text."""
        ...


def inference_model(model: LanguageModel) -> Any:
    """Returns the model for inference: the part that `inference_part` names."""
    return getattr(model, model.inference_part) if model.inference_part else model


def inference_params(model: LanguageModel, params: Any) -> Any:
    """Returns the parameters of `inference_model`, a part of this model's."""
    return params[model.inference_part] if model.inference_part else params


def inference_root(model: LanguageModel) -> str:
    """Returns what the paths of those parameters begin with: 'backbone/', or '' for the whole model."""
    return model.inference_part and f"{model.inference_part}/"
