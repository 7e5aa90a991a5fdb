"""Describes the function that a model computes, as a flat dict of settings read from its modules.

Factories may be any callables, such as gin's, so settings are read from the modules that they return:
a linen module made outside another module only records its fields. Two models with equal descriptions
compute the same function of the same parameters.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from espalier.model import axes
from espalier.model.config import LayerKind
from espalier.model.protocol import Same
from espalier.model.rope import SCALINGS, Rope
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Transformer
from espalier.model.transforms import layer_stack

# Arguments for calling the factories in a module's fields; their values do not enter the description.
_TABLE_DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}
_TABLE = {"features": 1, **_TABLE_DTYPES}
_CALLS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("attention", "mlp", "shared")},
    **{name: {"name": name} for name in ("norm", "post_norm", "qk_norm")},
    "cross_attention": {"name": "cross_attention"},
    **{name: {"num_embeddings": 1, **_TABLE} for name in ("embed", "head")},
    "relative_bias": {"num_heads": 1, "bidirectional": True, **_TABLE_DTYPES},
    "position_embed": _TABLE,
    "dense": {"axes": ("embed", "mlp"), "use_bias": False, "name": "dense", **_TABLE},
    "router": {"axes": ("embed", "unmodeled"), "name": "router", **_TABLE},
    "expert_dense": {
        "axes": ("expert", "embed", "mlp"),
        "num_experts": 1,
        "name": "dense",
        **_TABLE,
    },
}
_SIZED = (
    "attention",
    "cross_attention",
    "mlp",
    "shared",
)  # factories that also take the shared sizes
# Fields that are not compared here. Some do not change the computed function, such as the implementation and
# the weights of auxiliary losses. Others are passed by the owner and compared there.
_SILENT = {
    *("parent", "name", "config", "kind", "block", "implementation"),
    *("features", "num_embeddings", "axes", "dtype", "param_dtype"),
    *("kernel_init", "embedding_init", "query_init", "dropout"),
    *("balance_loss", "router_z_loss", "capacity_factor", "exchange_factor"),
}


def describe(model: Transformer) -> dict[str, Any]:
    """Returns a model's settings by dotted name: 'config.num_layers', 'block.attention.softcap', ...

    The entry 'layers' lists the window and rotation of each layer, and 'mlps' the names of their MLPs if layers have several kinds.
    The settings of 'block' are those of the first layer whose kind names no MLP. A named MLP has entries of its own, such as
    'block.mlp:dense'; other settings in which a kind of layer differs too, by the first of these layers: 'block_3.attention'.
    """
    config = model.config
    sizes = ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim")
    fields: dict[str, Any] = {f"config.{name}": getattr(config, name) for name in sizes}
    fields["config.num_kv_heads"] = config.kv_heads
    fields["config.head_dim"] = config.per_head_dim
    kinds = [config.layer_kind(i) for i in range(config.num_layers)]
    fields["layers"] = tuple((kind.window, kind.rope) for kind in kinds)
    if any(kind.mlp for kind in kinds):
        fields["mlps"] = tuple(kind.mlp for kind in kinds)
    fields |= dict(_fields(model, ""))
    if isinstance(model, EncoderDecoder):
        fields["encoder_layers"] = model.encoder_config.num_layers
    first: dict[str, Any] = {}
    for i, kind in sorted(_different(kinds).items(), key=lambda item: (bool(item[1].mlp), item[0])):
        block = model.block(config=config, kind=kind, name=f"block_{i}")
        entries = {"": type(block), **dict(_fields(block, "."))}
        if not first:
            first = entries
            fields |= {"block" + name: value for name, value in entries.items()}
        for name, value in entries.items():
            if kind.mlp and name.startswith(".mlp"):
                fields[f"block.mlp:{kind.mlp}{name.removeprefix('.mlp')}"] = value
            elif first.get(name) != value:
                fields[f"block_{i}{name}"] = value
    scale = fields.get("block.attention.scale", 0)
    if scale is None:
        fields["block.attention.scale"] = config.per_head_dim**-0.5
    if fields.get("block.mlp.expert_dim", 0) is None:
        fields["block.mlp.expert_dim"] = config.mlp_dim
    _set_local_rope(fields)
    return fields


def _different(kinds: Sequence[LayerKind]) -> dict[int, LayerKind]:
    """Returns the kinds of layers that are not equal to an earlier layer's, by layer."""
    firsts = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    return {i: kinds[i] for i in firsts.values()}


def _set_local_rope(fields: dict[str, Any]) -> None:
    """Describes the rotary embedding of layers with a window, whichever field has it, if there are such layers."""
    local, rope = "block.attention.local_rope", "block.attention.rope"
    if not any(window is not None and rotated for window, rotated in fields["layers"]):
        for name in [name for name in fields if f"{name}.".startswith(f"{local}.")]:
            del fields[name]
    elif local in fields and fields[local] is None:
        for name in [name for name in fields if f"{name}.".startswith(f"{rope}.")]:
            fields[local + name.removeprefix(rope)] = fields[name]


def _fields(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(module):
        if field.name in _SILENT:
            continue
        value, name = getattr(module, field.name), prefix + field.name
        if field.name in _CALLS and value is not None:
            passed = dict(_CALLS[field.name])
            if field.name in _SIZED:
                passed["config"] = module.config
            if field.name.endswith("attention") or field.name == "mlp":
                passed["kind"] = module.kind
            part = value(**passed)
            yield name, type(part)
            yield from _fields(part, name + ".")
        elif isinstance(value, Rope):
            yield name, Rope
            yield from ((f"{name}.{key}", v) for key, v in _rope(value).items())
        else:
            yield name, value


def _rope(rope: Rope) -> dict[str, Any]:
    """Returns the settings that affect the rotary embedding with its kind of scaling."""
    names = ("base", "layout", "fraction", "scaling", *SCALINGS[rope.scaling])
    settings = {name: getattr(rope, name) for name in names}
    if "attention_factor" in settings:
        settings["attention_factor"] = rope.magnitude
    return settings


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Returns the differences between two descriptions, such as 'block.attention.softcap is 50.0, not None'."""
    absent = object()
    words = []
    for name in [*here, *(name for name in there if name not in here)]:
        a, b = here.get(name, absent), there.get(name, absent)
        # If the owner differs, its difference is enough: skip its settings.
        owner = name.rpartition(".")[0]
        if owner in here and owner in there and here[owner] != there[owner]:
            continue
        if name in _OF_LAYERS and a != b and absent not in (a, b) and len(a) == len(b):
            layer = next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
            name, a, b = f"layer {layer}", _OF_LAYERS[name](a[layer]), _OF_LAYERS[name](b[layer])
        if not _equal(a, b):
            shown = ["absent" if value is absent else _shown(value) for value in (a, b)]
            words.append(f"{name} is {shown[0]}, not {shown[1]}")
    return words


def _shown(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    return value if isinstance(value, str) else repr(value)


def _kind(kind: tuple[int | None, bool]) -> str:
    """Returns a layer's kind in words."""
    window, rope = kind
    seen = "seeing all" if window is None else f"of window {window}"
    return f"one {seen}{'' if rope else ' without rotation'}"


def _mlp(name: str) -> str:
    """Returns the kind of a layer's MLP in words."""
    return f"one with the MLP {name!r}" if name else "one with the MLP of other layers"


# Entries with a value for each layer, and what says one in words.
_OF_LAYERS: dict[str, Callable[[Any], str]] = {"layers": _kind, "mlps": _mlp}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        # Files store decimals, so sqrt(D) changes slightly when written and read back.
        return a == b or math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def native_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the model's parameters by path, such as 'layers/block_0/mlp/up/kernel'."""
    return dict(_native_shapes(Same(model)))


# An import or export calls this several times.
@functools.lru_cache(maxsize=4)
def _native_shapes(model: Same) -> dict[str, tuple[int, ...]]:
    traced, config = model.value, model.value.config
    if not config.scan_layers:
        # Tracing one period of the layers takes a tenth of the time of a deep model's.
        traced = traced.clone(config=dataclasses.replace(config, scan_layers=True))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(traced.init, jax.random.key(0), tokens)["params"]
    # Not nn.unbox, which would split shapes over a mesh that is in use.
    params = jax.tree.map(lambda x: getattr(x, "value", x), boxed, is_leaf=axes.is_boxed)
    if traced is not model.value:
        params = jax.eval_shape(lambda x: layer_stack.unroll(x, traced.config), params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(key.key) for key in path): leaf.shape for path, leaf in leaves}
