"""A compiled program as bytes of the runtime and a description in JSON, and the compiled program again.

jax's own way of doing so pickles the description. The bytes are the same, so that a loaded program is the one that was
compiled: nothing is traced, lowered or compiled. This uses private interfaces of jax: if a version of jax has others, programs are
not stored, and the description is that of the version that wrote it (trainers/programs/surroundings.py).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import core
from jax._src.interpreters import pxla
from jax._src.layout import Layout
from jax._src.lib import xla_client
from jax.sharding import NamedSharding
from jax.stages import ArgInfo, Compiled

from espalier.trainers.programs import structures
from espalier.trainers.programs.recorded import Entry, recorded
from espalier.trainers.programs.structures import Unstorable, exactly

__all__ = ["load", "parts", "recorded"]


def parts(compiled: Compiled, entry: Entry) -> tuple[dict[str, Any], bytes]:
    """Returns (description in JSON types, bytes of the executable).

    Args:
      entry: what jax's cache read or wrote when the program was compiled.

    Raises:
      Unstorable: the program calls the host, closes over arrays, or has other parts that have no description.
    """
    try:
        description = _described(compiled, entry)
        whole: Any = compiled._executable._unloaded_executable  # type: ignore[attr-defined]
        # It is made again, but for the bytes, so that another version of jax is noticed here.
        _compiled(description, whole.xla_executable, whole.device_list, whole.backend)
        return description, entry.executable or whole.xla_executable.serialize()
    except (AttributeError, KeyError, TypeError, NotImplementedError) as error:
        raise Unstorable(f"this version of jax has another form of programs ({error!r})") from error


def _described(compiled: Compiled, entry: Entry) -> dict[str, Any]:
    whole: Any = compiled._executable._unloaded_executable  # type: ignore[attr-defined]
    arguments = whole.all_args_info
    if whole.host_callbacks or whole.ordered_effects or whole.unordered_effects or whole.keepalive:
        raise Unstorable("it calls functions of the host")
    if not entry.searched:
        raise Unstorable("jax had compiled or loaded it before")
    if compiled._params.const_args:
        raise Unstorable("it closes over arrays")
    others = (whole.mut, whole.pgle_profiler, *whole.dispatch_in_layouts)
    if any(other is not None for other in others) or arguments is None or compiled._no_kwargs:
        raise Unstorable("it changes its arguments in place, or has layouts of its own")
    devices = [device.id for device in whole.device_list]
    return {
        "name": whole.name,
        "devices": devices,
        "committed": whole.committed,
        "kept": sorted(whole.kept_var_idx),
        "in_tree": exactly(structures.tree, structures.tree_of, compiled.in_tree),
        "out_tree": exactly(structures.tree, structures.tree_of, compiled.out_tree),
        "donated": [info.donated for info in jax.tree.leaves(compiled.args_info)],
        "arguments": _shapes(arguments.in_avals),
        "inputs": _shapes(whole.input_avals),
        "outputs": _shapes(whole.output_avals),
        "input_shardings": _shardings(whole.input_shardings),
        "output_shardings": _shardings(whole.output_shardings),
        "input_layouts": _layouts(whole.xla_in_layouts),
        "output_layouts": _layouts(whole.xla_out_layouts),
    }


def _shapes(values: Any) -> list[Any]:
    return [exactly(_shape, _shape_of, value) for value in values]


def _shardings(values: Any) -> list[Any]:
    return [exactly(structures.sharding, structures.sharding_of, value) for value in values]


def _layouts(values: Any) -> list[Any]:
    return [exactly(_layout, _layout_of, value) for value in values]


def load(description: dict[str, Any], executable: bytes) -> Compiled:
    """Returns the compiled program of `parts`.

    Raises:
      Unstorable: this version of jax has another form of programs, or the runtime refuses the bytes.
    """
    by_id = {device.id: device for device in jax.devices()}
    try:
        devices = xla_client.DeviceList(tuple(by_id[i] for i in description["devices"]))
        backend = devices[0].client
        loaded = backend.deserialize_executable(executable, executable_devices=devices)
        return _compiled(description, loaded, devices, backend)
    except (RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unstorable(f"it cannot be loaded: {error!r}") from error


def _compiled(description: dict[str, Any], loaded: Any, devices: Any, backend: Any) -> Compiled:
    in_tree = structures.tree_of(description["in_tree"])
    all_shapes = list(map(_shape_of, description["arguments"]))
    debug = core.DebugInfo(
        "jit", description["name"], tuple(f"argument {i}" for i in range(len(all_shapes))), None
    )
    input_layouts = list(map(_layout_of, description["input_layouts"]))
    known: dict[str, Any] = {
        "xla_executable": loaded,
        "device_list": devices,
        "backend": backend,
        "input_avals": list(map(_shape_of, description["inputs"])),
        "input_shardings": list(map(structures.sharding_of, description["input_shardings"])),
        "output_avals": list(map(_shape_of, description["outputs"])),
        "output_shardings": list(map(structures.sharding_of, description["output_shardings"])),
        "committed": description["committed"],
        "name": description["name"],
        "unordered_effects": [],
        "ordered_effects": [],
        "keepalive": [],
        "host_callbacks": [],
        "kept_var_idx": set(description["kept"]),
        "mut": None,
        "xla_in_layouts": input_layouts,
        "dispatch_in_layouts": [None] * len(input_layouts),
        "xla_out_layouts": list(map(_layout_of, description["output_layouts"])),
        "all_args_info": pxla.AllArgsInfo(all_shapes, debug),
        "pgle_profiler": None,
    }
    whole = pxla.UnloadedMeshExecutable
    fields = {field.name for field in dataclasses.fields(whole)}
    program = whole(**{name: known[name] for name in fields}).load()
    infos = [
        ArgInfo(value, donated)
        for value, donated in zip(all_shapes, description["donated"], strict=True)
    ]
    out_tree = structures.tree_of(description["out_tree"])
    return Compiled(program, [], jax.tree.unflatten(in_tree, infos), out_tree)


def _shape(value: Any) -> Any:
    """Returns an abstract array (a `ShapedArray` of a compiled program) in JSON types."""
    kind = getattr(value, "dtype", None)
    impl = getattr(kind, "_impl", None)  # of random keys
    described: dict[str, Any] = {
        "shape": [int(size) for size in value.shape],
        "dtype": str(kind) if impl is None else impl.name,
        "keys": impl is not None,
        "weak": bool(value.weak_type),
        "mesh": None,
    }
    if not value.sharding.mesh.empty:
        described["mesh"] = structures.axes(value.sharding.mesh)
        described["spec"] = structures.spec_entries(value.sharding.spec)
    return described


def _shape_of(described: Any) -> Any:
    """Returns the abstract array that `_shape` has described."""
    name = described["dtype"]
    dtype: Any = _key_dtype(name) if described["keys"] else jnp.dtype(name)
    placed = None
    if described["mesh"] is not None:
        # Of which devices it is made does not matter here, but their kind does.
        mesh = structures.mesh_of(described["mesh"], jax.devices())
        placed = NamedSharding(mesh.abstract_mesh, structures.spec_of(described["spec"]))
    return core.ShapedArray(
        tuple(described["shape"]), dtype, weak_type=described["weak"], sharding=placed
    )


@functools.cache
def _key_dtype(name: str) -> Any:
    """Returns the dtype of random keys of an implementation."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=name)).dtype


def _layout(value: Any) -> Any:
    """Returns the layout of an array in memory in JSON types."""
    if not isinstance(value, Layout):
        raise Unstorable(f"an array has the layout {value!r}")
    tiling = None if value.tiling is None else [list(tile) for tile in value.tiling]
    return [list(value.major_to_minor), tiling, value.sub_byte_element_size_in_bits]


def _layout_of(described: Any) -> Any:
    """Returns the layout that `_layout` has described."""
    major_to_minor, tiling, bits = described
    tiles = None if tiling is None else tuple(map(tuple, tiling))
    return Layout(tuple(major_to_minor), tiles, bits)
