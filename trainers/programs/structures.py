"""Pytrees and shardings as JSON, and back: what is stored beside an executable, without pickle.

Every function pair is exact: `undescribed(described(x)) == x`, or `Unstorable` is raised. Classes of a tree are looked up
by name in modules that this process has already imported.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)
from jax.tree_util import PyTreeDef, default_registry

_SIMPLE = (bool, int, float, str, type(None))


class Unstorable(Exception):  # noqa: N818  not an error: the program goes the ordinary way
    """Something that has no description here, or an executable that cannot be stored."""


def tree(definition: PyTreeDef) -> Any:
    """Returns a tree's structure in JSON types."""
    if (data := definition.node_data()) is None:
        return "*"
    kind, static = data
    if kind is type(None):
        return None
    children = [tree(child) for child in definition.children()]
    return [f"{kind.__module__}:{kind.__qualname__}", _static(static), children]


def tree_of(described: Any) -> PyTreeDef:
    """Returns the structure that `tree` has described."""
    if described == "*":
        return jax.tree.structure(0)
    if described is None:
        return jax.tree.structure(None)
    name, static, children = described
    data = (_class(name), _static_of(static))
    return PyTreeDef.from_node_data_and_children(
        default_registry, data, [tree_of(child) for child in children]
    )


def _static(value: Any) -> Any:
    """Returns a node's static data in JSON types: simple values, tuples, lists and classes."""
    if isinstance(value, type):
        return {"class": f"{value.__module__}:{value.__qualname__}"}
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return {type(value).__name__: [_static(item) for item in value]}
    if type(value) in _SIMPLE:
        return value
    raise Unstorable(f"a tree has a node with static data {value!r}")


def _static_of(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "class":
        return _class(items)
    return {"tuple": tuple, "list": list}[kind](map(_static_of, items))


def _class(name: str) -> type:
    module, _, path = name.partition(":")
    value: Any = sys.modules.get(module)
    for part in path.split("."):
        value = getattr(value, part, None)
    if not isinstance(value, type):
        raise Unstorable(f"{name} is no class that this process has imported")
    return value


def sharding(value: Any) -> Any:
    """Returns a sharding of named axes or of one device, in JSON types."""
    if value is None:
        return None
    described: Any
    if isinstance(value, SingleDeviceSharding):
        devices: Any = value.device_set
        described = {"device": next(iter(devices)).id, "memory": value.memory_kind}
    elif isinstance(value, NamedSharding) and isinstance(value.mesh, Mesh):
        mesh: Any = value.mesh
        described = {
            "axes": axes(mesh),
            "devices": [device.id for device in mesh.devices.flat],
            "spec": spec_entries(value.spec),
            "memory": value.memory_kind,
        }
    else:
        raise Unstorable(f"a sharding is {value}")
    return described


def sharding_of(described: Any) -> Any:
    """Returns the sharding that `sharding` has described, on the devices of this process."""
    if described is None:
        return None
    devices = {device.id: device for device in jax.devices()}
    memory = described["memory"]
    if "device" in described:
        return SingleDeviceSharding(devices[described["device"]], memory_kind=memory)
    mesh = mesh_of(described["axes"], [devices[i] for i in described["devices"]])
    return NamedSharding(mesh, spec_of(described["spec"]), memory_kind=memory)


def axes(mesh: Any) -> list[Any]:
    """Returns the names, sizes and types of a mesh's axes."""
    sizes = [mesh.shape[name] for name in mesh.axis_names]
    if not all(isinstance(name, str) for name in mesh.axis_names):
        raise Unstorable(f"a mesh has the axes {mesh.axis_names}")
    return [list(mesh.axis_names), sizes, [kind.name for kind in mesh.axis_types]]


def mesh_of(described: Any, devices: Sequence[Any]) -> Mesh:
    """Returns the mesh of `axes` on the first of these devices."""
    names, sizes, types = described
    grid = np.array(devices[: math.prod(sizes)], dtype=object).reshape(sizes)
    return Mesh(grid, tuple(names), axis_types=tuple(AxisType[kind] for kind in types))


def spec_entries(spec: PartitionSpec) -> list[Any]:
    """Returns the names of axes over which each axis of an array is divided."""
    if spec != PartitionSpec(*spec):  # it has more than its entries, such as unreduced axes
        raise Unstorable(f"a sharding has the spec {spec}")
    for entry in spec:
        names = entry if isinstance(entry, tuple) else (entry,)
        if not all(name is None or isinstance(name, str) for name in names):
            raise Unstorable(f"a sharding has the spec {spec}")
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]


def spec_of(entries: Sequence[Any]) -> PartitionSpec:
    """Returns the spec that `spec_entries` has described."""
    return PartitionSpec(*(tuple(e) if isinstance(e, list) else e for e in entries))


def exactly(describe: Callable[[Any], Any], restore: Callable[[Any], Any], value: Any) -> Any:
    """Returns `describe(value)`; raises Unstorable unless `restore` makes an equal value of it."""
    described = describe(value)
    if restore(described) != value:
        raise Unstorable(f"{value} cannot be described")
    return described
