"""The interface of models that trainers and commands use, besides flax's `init`, `apply` and `clone`.

Every model implements `Model` (model/transformer.py, model/heads/, model/vision/resnet.py); models of tokens also
implement `LanguageModel`. Callers do not probe modules for attributes or build factories to read their fields: a layer
has `settings` and `flops_per_token` (model/flops.py), and a wrapper of a layer forwards them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax

from espalier.model.config import LayerKind
from espalier.model.kv_cache.base import CacheSizes
from espalier.model.rows import RowKind

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
      implementation: see `Attention.implementation`.
    """

    query_heads: int
    cache_heads: int
    head_dim: int
    experts: int = 0
    top_k: int | None = None
    shared_kv: bool = False
    adapters: Any = None
    implementation: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpSettings:
    """Settings of one layer's MLP.

    Attributes:
      kind: name of the class, for messages.
      gated: whether the MLP, or each expert, is down(act(gate) * up).
      experts: E, 0 without a router.
      top_k: number of experts that a token uses.
      router: the router of the experts, as a module that is not bound to parameters; None without experts.
      adapters: the factory of its adapters (model/adapters/adapter.py), or None.
    """

    kind: str
    gated: bool
    experts: int = 0
    top_k: int = 1
    router: Any = dataclasses.field(default=None, compare=False)
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

    Attributes:
      row: the kind of data in a row of a batch (model/rows.py).
      output: the kind of output for a row: logits or rewards of each token, or logits of classes.
      inputs_prefix: ids with which the inputs of every row begin, such as virtual tokens; empty for rows without inputs.
    """

    @property
    def config(self) -> Any: ...
    @property
    def row(self) -> RowKind: ...
    @property
    def output(self) -> Output: ...
    @property
    def inputs_prefix(self) -> tuple[int, ...]: ...

    def init(self, *args: Any, **kwargs: Any) -> Any: ...
    def apply(self, *args: Any, **kwargs: Any) -> Any: ...

    def layer_settings(self) -> Sequence[LayerSettings]:
        """Returns the settings of every layer, by depth; an empty sequence unless it is a transformer."""
        ...

    def row_context(self, variables: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """Returns the context of a batch's rows (model/rows.py) for `rows.given`; None if no layer reads one.

        Args:
          variables: the model's variables.
          batch: the batch's columns; of generation `Prompts.columns`, where each row has one example.
        """
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


class OfLayers:
    """The part of `Model` that the adapters of a model's layers answer."""

    def row_context(self: Any, variables: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """See `Model`."""
        adapters = adapters_of(self)
        return None if adapters is None else adapters.row_context(self, variables, batch)

    @property
    def inputs_prefix(self: Any) -> tuple[int, ...]:
        """See `Model`."""
        adapters = adapters_of(self) if self.row.encodes else None
        return () if adapters is None else adapters.inputs_prefix


def adapters_of(model: Model) -> Any:
    """Returns the adapters of a model, see model/adapters/adapter.py; None without any."""
    for layer in model.layer_settings():
        for part in (layer.attention, layer.mlp):
            if part.adapters is not None and part.adapters.slots:
                return part.adapters
    return None


def inference_model(model: LanguageModel) -> Any:
    """Returns the model for inference: the part that `inference_part` names."""
    return getattr(model, model.inference_part) if model.inference_part else model


def inference_params(model: LanguageModel, params: Any) -> Any:
    """Returns the parameters of `inference_model`, a part of this model's."""
    return params[model.inference_part] if model.inference_part else params


def inference_root(model: LanguageModel) -> str:
    """Returns what the paths of those parameters begin with: 'backbone/', or '' for the whole model."""
    return model.inference_part and f"{model.inference_part}/"
