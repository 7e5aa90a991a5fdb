"""The seam of adapters: small modules that change one projection of a frozen model.

Attention, MLPs and experts call their factory `adapters` with each projection that their `dense` makes, whatever class
that is. `named(...)` makes this factory: it wraps the projection in an `Adapted`, which applies the adapter whose
patterns match the projection's path. The projection keeps its own parameters and paths, so that any checkpoint of the
base model is one of the adapted model without adapters. An adapter's parameters are below `adapter_<slot>`, for example
'layers/block_0/attention/query/adapter_lora/lora_a'. Where they are absent from the parameters, the same module computes
the base model.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from espalier.common.ranges import recordable
from espalier.model import layer_groups
from espalier.model.flops import Counted
from espalier.model.protocol import adapters_of
from espalier.model.transforms.patterns import PROJECTIONS, fullmatch

PREFIX = "adapter_"
LEAVES = rf"(.*/)?{PREFIX}\w+/.*"  # whole paths of adapters' parameters


class AdapterError(ValueError):
    """Adapters that do not fit each other or the model."""


class Adapter(Counted):
    """What changes one projection; called with (site, x) or, at experts, (site, rows, sizes).

    Attributes:
      param_dtype: dtype of the adapter's parameters, whatever the dtype of the frozen ones.
    """

    # The fields with patterns, regular expressions that match the whole paths of projections.
    PATTERNS: ClassVar[tuple[str, ...]] = ("layers",)
    # Fields that change only training.
    TRAINING: ClassVar[tuple[str, ...]] = (
        "param_dtype",
        "a_init",
        "b_init",
        "router_init",
        "dropout",
        "jitter",
        "balance_loss",
    )

    param_dtype: jnp.dtype = jnp.float32

    @nn.nowrap
    def patterns(self) -> list[tuple[str, str]]:
        """Returns (field, pattern) of all patterns of sites."""
        return [(field, pattern) for field in self.PATTERNS for pattern in getattr(self, field)]

    @nn.nowrap
    def fields_at(self, path: str) -> list[str]:
        """Returns the fields in PATTERNS that choose the projection at `path`."""
        matching = (f for f, pattern in self.patterns() if fullmatch(pattern, path))
        return list(dict.fromkeys(matching))

    @nn.nowrap
    def row_context(
        self, model: Any, variables: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns what this adapter reads of a batch's rows, by a name of its own: see `Model.row_context`."""
        del model, variables, batch
        return {}

    @property
    def inputs_prefix(self) -> tuple[int, ...]:
        """Ids with which an encoder's inputs begin."""
        return ()

    @property
    def of_experts(self) -> bool:
        """Whether it adapts stacked experts, each with parameters of its own."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """The class and the fields that the outputs depend on, as JSON values."""
        names = [x.name for x in dataclasses.fields(self) if x.name not in ("name", "parent")]
        values = {name: getattr(self, name) for name in names if name not in self.TRAINING}
        return json.loads(json.dumps({"class": type(self).__name__, **values}))

    @property
    def site_path(self) -> str:
        """The path of the adapted projection."""
        assert self.scope is not None
        return "/".join(self.scope.path[:-1])


class Adapted(nn.Module):
    """A projection and the adapter at its path, if there is one; both share a scope.

    Attributes:
      base: the projection.
      adapters: the adapters of the model.
      heads: number of heads whose outputs the projection joins; 1 for a projection without heads.
      layer_input: the input [..., D] of the attention, MLP or expert that owns the projection.
      gate: the activated branch [..., F] of a gated MLP, at its last projection; None elsewhere.
    """

    base: Any
    adapters: "Adapters"
    heads: int = 1
    layer_input: Any = None
    gate: Any = None

    def setup(self):
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x: jax.Array, *sizes: jax.Array) -> jax.Array:
        slot = self._slot()
        if slot is None:
            return self.base(x, *sizes)
        adapter = self.adapters.adapter(slot).clone(name=PREFIX + slot, parent=self)
        if sizes and not adapter.of_experts:
            raise AdapterError(
                f"{adapter.site_path} projects stacked experts, which adapter.named.{slot} cannot adapt: exclude it from "
                f"its {', '.join(adapter.PATTERNS)}, or use another adapter, or LoRA without DoRA, there."
            )
        return adapter(self, x, *sizes)

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical names of the projection's input and output."""
        return tuple(self.base.axes[-2:])

    def bias(self) -> jax.Array | None:
        """Returns the projection's bias once it was called."""
        if not self.base.has_variable("params", "bias"):
            return None
        return nn.meta.unbox(self.base.get_variable("params", "bias"))

    def _slot(self) -> str | None:
        """Returns the slot of the adapter at this projection; None without one.

        Unrolling layers changes their paths, so after initialisation the parameters decide.
        """
        if not self.is_initializing():
            there = (x for x in self.adapters.slots if self.has_variable("params", PREFIX + x))
            return next(there, None)
        assert self.scope is not None
        path = "/".join(self.scope.path)
        slots = [slot for slot, one in self.adapters.slots.items() if one.fields_at(path)]
        if len(slots) > 1:
            raise AdapterError(
                f"{path} would have two adapters, adapter.named.{slots[0]} and adapter.named.{slots[1]}: one adapter per "
                "projection; narrow the patterns of one, or set its slot to None."
            )
        return slots[0] if slots else None


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
    """The factory `adapters` of attention, MLPs and experts.

    Attributes:
      slots: adapters with their settings, outside of any model, by slot in the order of the slots' names.
    """

    slots: Mapping[str, Adapter]

    def __call__(self, base: Any, **site: Any) -> Any:
        """Returns the projection with its adapter; `base` itself if there are none at all. `site`: fields of `Adapted`."""
        return Adapted(base=base, adapters=self, **site) if self.slots else base

    def __repr__(self) -> str:
        return f"Adapters({self.settings})"  # of equal models equal, unlike that of functions

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings of each adapter by slot, as JSON values: what a checkpoint of adapters records."""
        return {slot: adapter.settings for slot, adapter in self.slots.items()}

    def row_context(
        self, model: Any, variables: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Returns what the adapters read of a batch's rows, by name; None for nothing."""
        context: dict[str, Any] = {}
        for adapter in self.slots.values():
            context |= adapter.row_context(model, variables, batch)
        return context or None

    @property
    def inputs_prefix(self) -> tuple[int, ...]:
        """Ids with which an encoder's inputs begin."""
        return tuple(id for adapter in self.slots.values() for id in adapter.inputs_prefix)

    def adapter(self, slot: str) -> Adapter:
        """Returns the adapter of a slot, outside of any model."""
        return self.slots[slot]


@recordable
def named(**slots: Callable[..., Any] | None) -> Adapters:
    """Returns the factory of these adapters, without slots that are None.

    Each method fills a slot of its own (`adapter.named.lora = @lora.Lora`), so that one model can have several kinds of
    adapters at different projections.
    """
    # Made here, with the bindings of now: a command may read another configuration before it merges them.
    made = {slot: make(name=None, parent=None) for slot, make in sorted(slots.items()) if make}
    return Adapters(made)


def record(model: Any) -> dict[str, Any]:
    """Returns the facts of a checkpoint of this model about its adapters; {} without any.

    `added` is the beginning of the names of their modules (trainers/checkpoints/base_step.py).
    """
    adapters = adapters_of(model)
    return {} if adapters is None else {"adapters": adapters.settings, "added": PREFIX}


def check_settings(model: Any, recorded: Mapping[str, Any] | None, where: Any) -> None:
    """Raises AdapterError if a model's adapters have other settings than those recorded with the checkpoint `where`.

    Slots that only one of both has are no difference: their parameters are missing or new.
    """
    adapters = adapters_of(model)
    here = {} if adapters is None else adapters.settings
    for slot, there in (recorded or {}).items():
        for name in here.get(slot, ()):
            if there.get(name) != here[slot][name]:
                raise AdapterError(
                    f"checkpoint {where} has adapters of other settings: {name} of adapter.named.{slot} is "
                    f"{there.get(name)!r} there and {here[slot][name]!r} here. Use the recorded settings, or train new adapters."
                )


def rescaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x * scale in the dtype of x, from float32: near 1, a bfloat16 scale moves by 0.4 % or not at all."""
    return (x.astype(jnp.float32) * scale.astype(jnp.float32)).astype(x.dtype)


def is_adapter(path: str) -> bool:
    """Returns whether the parameter at a path is an adapter's."""
    return re.fullmatch(LEAVES, path) is not None


def report(params: Any, *, adapters: Adapters) -> list[str]:
    """Returns lines with the sites and the size of each adapter.

    Raises:
      AdapterError: a pattern of an adapter matches no layer that can be adapted.
    """
    sites = _sites(params)
    lines, total = [], 0
    for slot, adapter in adapters.slots.items():
        own = {path: size for path, (there, size) in sites.items() if there == slot}
        for field, pattern in adapter.patterns():
            if not any(fullmatch(pattern, path) for path in own):
                raise AdapterError(
                    f"adapter.named.{slot}: the pattern {pattern!r} of its `{field}` matches no layer that can be adapted; "
                    f"{_examples(sites)}."
                )
        total += sum(own.values())
        lines.append(
            f"adapter {slot}: {type(adapter).__name__} at {_where(params, own)}, {sum(own.values()):,} parameters"
        )
    everything = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    base = everything - total
    lines.append(
        f"adapters are {total:,} parameters, {total / base:.3%} of the base model's {base:,}"
    )
    return lines


def _where(params: Any, sites: Collection[str]) -> str:
    """Returns how many projections have an adapter, such as '7 projections of each of 30 layers'."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        if match := layer_groups.BLOCK.fullmatch(path):
            shapes.setdefault(f"{match[1]}/block_{match[2]}", []).append(leaf.shape)
    matches = [layer_groups.BLOCK.fullmatch(f"{site}/kernel") for site in sites]
    blocks = collections.Counter(f"{match[1]}/block_{match[2]}" for match in matches if match)
    layers = 0
    for block in blocks:
        # Blocks of stacked layers have an axis of layers in front of every array.
        first = {shape[0] if len(shape) > 1 else 0 for shape in shapes[block]}
        layers += first.pop() if len(first) == 1 and 0 not in first else 1
    each = set(blocks.values())
    if len(each) == 1 and all(matches):
        count = each.pop()
        return f"{count} projection{'s' * (count != 1)} of {f'each of {layers} layers' if layers > 1 else 'one layer'}"
    return f"{len(sites)} layer{'s' * (len(sites) != 1)}"


def _sites(params: Any) -> dict[str, tuple[str | None, int]]:
    """Returns the slot and the adapter's number of parameters of each projection and table, by path."""
    sites: dict[str, tuple[str | None, int]] = {}

    def visit(node: Any, path: str) -> None:
        if not isinstance(node, Mapping):
            return
        slot = next((name for name in node if name.startswith(PREFIX)), None)
        if {"kernel", "u", "embedding"} & set(node):
            leaves = jax.tree.leaves(node[slot]) if slot else []
            size = sum(math.prod(leaf.shape) for leaf in leaves)
            sites[path] = (slot and slot.removeprefix(PREFIX), size)
        for name, child in node.items():
            if not name.startswith(PREFIX):
                visit(child, f"{path}/{name}" if path else name)

    visit(params, "")
    return sites


def _examples(sites: Mapping[str, Any]) -> str:
    names = [path for path in sites if re.fullmatch(PROJECTIONS[0], path)]
    if not names:
        return "this model has no attention or MLP, whose projections adapters change, and convolutions have no adapter"
    return f"layers are {', '.join(names[:4])}{', ...' if names[4:] else ''}"
