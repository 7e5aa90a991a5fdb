"""Meshes, rule sets from logical axes to mesh axes, and their strict validation.

A misspelt logical name would silently replicate an array, and a mesh that does not divide a dimension
would fail deep inside the compiler, so both are checked before anything is allocated.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from espalier.model import axes
from espalier.model.axes import Rules
from espalier.model.kernels.context_method import method_for, method_problem
from espalier.model.kernels.platform import use_platform
from espalier.model.protocol import Model, Sizes

# data: copies of the model; fsdp: batch and parameters split together; expert: batch and experts split,
# the rest of the model copied; context: the length of rows and parameters split; tensor: heads and widths split.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
# Bytes of parameters that may stay whole on every device although a mesh axis splits parameters.
_MOST_WHOLE = 2**31


def make_mesh(
    *, shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh over MESH_AXES.

    Args:
      shape: sizes by axis name; missing axes are 1; one may be -1 for "all remaining devices".
        None puts every device on `data`.
      devices: the devices to use; all by default.

    On devices of several TPU slices, the outermost axes are split over the slices: `data`, then `fsdp` and so on. Only they
    use the slower network between slices.

    Raises:
      ValueError: unknown axis, or a shape that does not cover the devices exactly.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(shape, len(devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    if devices[0].platform != "tpu":
        return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # An axis that is no product of whole dimensions of the torus takes a part of one.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        within, between = _split_over_slices(sizes, slices)
        grid = mesh_utils.create_hybrid_device_mesh(
            within, between, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, MESH_AXES, axis_types=types)


def _split_over_slices(sizes: Sequence[int], slices: int) -> tuple[list[int], list[int]]:
    """Returns the sizes of MESH_AXES within a slice, and over slices, the outermost axes first."""
    within, between = list(sizes), [1] * len(sizes)
    for i, size in enumerate(sizes):
        between[i] = math.gcd(size, slices)
        within[i] = size // between[i]
        slices //= between[i]
    return within, between


def mesh_sizes(
    shape: Mapping[str, int] | None,
    count: int,
    accepts: Callable[[Mapping[str, int]], bool] = lambda shape: True,
    otherwise: Callable[[], str] = lambda: "",
) -> tuple[int, ...]:
    """Returns the sizes of MESH_AXES for `count` devices.

    Args:
      shape: sizes by axis name; missing axes are 1, and one may be -1 for all remaining devices. None is all on `data`.
      count: number of devices.
      accepts: whether an error may propose a shape.
      otherwise: returns what an error proposes if it may propose no shape.

    Raises:
      ValueError: an unknown axis, or a shape that does not cover the devices; the message proposes one that does.
    """
    shape = dict(shape or {"data": -1})
    unknown = set(shape) - set(MESH_AXES)
    if unknown:
        raise ValueError(f"MESH names unknown axes {sorted(unknown)}: use {MESH_AXES}.")
    sizes = [int(shape.get(axis, 1)) for axis in MESH_AXES]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"MESH = {shape}: give positive sizes, and at most one -1.")
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % fixed == 0:
        sizes[sizes.index(-1)] = count // fixed
    if math.prod(sizes) != count:
        raise ValueError(
            f"MESH = {shape} does not cover the {count} available devices: the product of "
            "its sizes must equal their number; -1 takes all remaining devices."
            + (_remedy("Here", shape, count, accepts) or f" {otherwise()}".rstrip())
        )
    return tuple(sizes)


def _remedy(
    where: str,
    shape: Mapping[str, int] | None,
    count: int,
    accepts: Callable[[Mapping[str, int]], bool],
) -> str:
    """Returns words with the mesh of `count` devices nearest to a shape that `accepts` is true of; '' without one.

    Meshes over the shape's own axes come before all others. The axis with -1, else fsdp, else the first one, takes what
    the others leave; the sizes of the others shrink to divisors of their own before they take other values.
    """
    shape = dict(shape or {"data": -1})
    free = min(shape, key=lambda axis: (shape[axis] != -1, axis != "fsdp"))

    def distance(sizes: Mapping[str, int]) -> tuple[Any, ...]:
        moved = [(size, shape.get(axis, 1)) for axis, size in sizes.items() if axis != free]
        foreign = sum(size > 1 and axis not in shape for axis, size in sizes.items())
        stranger = sum(before % size != 0 for size, before in moved)
        change = sum(abs(math.log2(size / before)) for size, before in moved)
        return foreign, stranger, change, -sizes["fsdp"]

    for sizes in sorted(_factorisations(count, MESH_AXES), key=distance):
        mesh = {axis: size for axis, size in sizes.items() if size > 1} or {free: 1}
        if accepts(mesh):
            return f' {where}: --gin.MESH="{mesh}".'
    return ""


def checked_mesh(
    shape: Mapping[str, int] | None,
    count: int,
    check: Callable[[AbstractMesh, int], None],
    *,
    batch_size: int,
    microbatches: int = 1,
) -> AbstractMesh:
    """Returns the mesh of so many devices, of which nothing is known.

    Args:
      shape: see `make_mesh`.
      count: number of devices.
      check: called with a mesh and the rows of a microbatch; raises ValueError if they do not fit the run.
      batch_size: rows of a batch.
      microbatches: parts of a batch that are computed one after the other.

    Raises:
      ValueError: the shape does not cover the devices, or that of `check`; with the nearest mesh that fits or, if there is
        none, the nearest batches and numbers of devices that have one.
    """

    def fits(mesh: Mapping[str, int], rows: int) -> bool:
        try:
            check(AbstractMesh(mesh_sizes(mesh, math.prod(mesh.values())), MESH_AXES), rows)
        except ValueError:
            return False
        return True

    def accepts(other: Mapping[str, int]) -> bool:
        return fits(other, batch_size // microbatches)

    def otherwise() -> str:
        return _other_sizes(count, fits, batch_size, microbatches)

    mesh = AbstractMesh(mesh_sizes(shape, count, accepts, otherwise), MESH_AXES)
    try:
        check(mesh, batch_size // microbatches)
    except ValueError as error:
        remedy = _remedy(f"A mesh of {count} devices that fits", shape, count, accepts)
        raise ValueError(f"{error}\n{remedy.lstrip() or otherwise()}".rstrip()) from None
    return mesh


def _other_sizes(
    count: int, fits: Callable[[Mapping[str, int], int], bool], batch_size: int, microbatches: int
) -> str:
    """Returns words with the nearest batches and numbers of devices that have a mesh, where these have none."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    # The mesh splits a batch into as many parts as the least one that it divides has rows.
    meshes = [mesh for mesh in _factorisations(count, MESH_AXES) if fits(mesh, count)]
    parts = {microbatches * next(n for n in divisors if fits(mesh, n)) for mesh in meshes}
    below = max((batch_size // n * n for n in parts), default=0)
    above = min((-(-batch_size // n) * n for n in parts), default=0)
    numbers = [2**power for power in range((4 * count).bit_length())]
    rows = batch_size // microbatches
    fitting = [n for n in numbers if any(fits(m, rows) for m in _factorisations(n, MESH_AXES))]
    nearest = [*[n for n in fitting if n < count][-1:], *[n for n in fitting if n > count][:1]]
    remedies = []
    if batches := [str(size) for size in (below, above) if size]:
        remedies.append(f"BATCH_SIZE={' or '.join(batches)}")
    if nearest:
        remedies.append(f"{' or '.join(map(str, nearest))} device{'s' if nearest != [1] else ''}")
    within = f" in {microbatches} microbatches" if microbatches > 1 else ""
    reason = f"divides a batch of {batch_size} rows{within}" if batches else "fits this run"
    return (
        f"No mesh of {count} devices {reason}: take {', or '.join(remedies)}." if remedies else ""
    )


def _factorisations(count: int, names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Yields all sizes by name whose product is `count`."""
    if len(names) == 1:
        yield {names[0]: count}
        return
    for size in range(1, count + 1):
        if count % size == 0:
            for rest in _factorisations(count // size, names[1:]):
                yield {names[0]: size, **rest}


def _mesh_axes(target: Any) -> tuple[str, ...]:
    return () if target is None else (target,) if isinstance(target, str) else target


def _rules(*targets: Mapping[str, Any]) -> Rules:
    """Returns a rule for every known name; names without a target are replicated."""
    merged: dict[str, Any] = {axes.BATCH: ("data", "fsdp")}
    for target in targets:
        merged |= target
    width = _mesh_axes(merged.get(axes.EMBED))
    merged[axes.LOOKUP_BATCH] = tuple(axis for axis in merged[axes.BATCH] if axis not in width)
    return tuple((name, merged.get(name)) for name in axes.ALL_AXES)


# A factor whose other side is not split is split along its rank.
_FSDP = {axes.EMBED: "fsdp", axes.CHANNELS: "fsdp", axes.RANK: "fsdp"}
_TENSOR = dict.fromkeys(
    (axes.HEADS, axes.KV_HEADS, axes.MLP, axes.VOCAB)
    + (axes.ACT_HEADS, axes.ACT_KV_HEADS, axes.ACT_MLP),
    "tensor",
)
_SEQUENCE = {axes.LENGTH: "tensor"}
# Context parallel: parameters are split over the devices of a row too.
_CONTEXT = dict.fromkeys(_FSDP, ("fsdp", "context")) | dict.fromkeys(
    (axes.LENGTH, axes.INNER_LENGTH), "context"
)
_EXPERT = {axes.EXPERT: "expert", axes.BATCH: ("data", "fsdp", "expert")}
# Key/value heads whole on every device, for fewer of them than tensor shards. Attention then takes its plain form,
# since a fused kernel needs the query heads of a device together with their own key/value heads.
_WHOLE_KV = {axes.KV_HEADS: None, axes.ACT_KV_HEADS: None}

RULE_SETS: dict[str, Rules] = {
    # Data parallel: parameters replicated, batch split over data and fsdp.
    "dp": _rules(),
    # Fully sharded data parallel: parameters, moments and batch split over fsdp (ZeRO-3).
    "fsdp": _rules(_FSDP),
    # Tensor parallel: heads, MLP width and vocabulary split (Megatron-LM, arXiv 1909.08053).
    "tp": _rules(_TENSOR),
    "fsdp_tp": _rules(_FSDP, _TENSOR),
    # The residual stream's length split over tensor too (arXiv 2205.05198).
    "fsdp_tp_sp": _rules(_FSDP, _TENSOR, _SEQUENCE),
    # Attention over parts of rows (arXiv 2309.14509 and 2310.01889).
    "fsdp_cp": _rules(_FSDP, _CONTEXT),
    "fsdp_tp_cp": _rules(_FSDP, _TENSOR, _CONTEXT),
    # Expert parallel: experts and batch split over expert, all else whole (GShard, arXiv 2006.16668).
    "ep": _rules(_EXPERT),
    "fsdp_ep": _rules(_FSDP, _EXPERT),
    "tp_whole_kv": _rules(_TENSOR, _WHOLE_KV),
    "fsdp_tp_whole_kv": _rules(_FSDP, _TENSOR, _WHOLE_KV),
    "fsdp_tp_sp_whole_kv": _rules(_FSDP, _TENSOR, _SEQUENCE, _WHOLE_KV),
}


def rules_named(name: str) -> Rules:
    if name not in RULE_SETS:
        raise ValueError(f"Unknown rule set {name!r}: choose from {sorted(RULE_SETS)}.")
    return RULE_SETS[name]


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Context manager in which models are traced and steps are called for a mesh.

    Inside it `with_sharding_constraint` of models has an effect, and models choose kernels for the mesh's platform.

    Args:
      mesh: devices with named axes, see `make_mesh`.
      rules: pairs of a logical axis and the mesh axes that split it, or None, such as the values of `RULE_SETS`.
    """
    platform = mesh.devices.flat[0].platform
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules), use_platform(platform):
        yield


def mesh_spec(names: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """The mesh axes of an array annotated with logical names."""
    spec = nn.logical_to_mesh_axes(names, rules)
    assert spec is not None  # only without names
    return spec


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Sharding of the leading batch dimension of every input array."""
    return NamedSharding(mesh, mesh_spec((axes.BATCH,), rules))


def shards_of(mesh: Mesh | AbstractMesh, target: Any) -> int:
    """Returns the number of shards that the target of a rule makes."""
    return math.prod(mesh.shape[name] for name in _mesh_axes(target))


def validate(
    *,
    mesh: Mesh | AbstractMesh,
    rules: Rules,
    config: Sizes,
    batch_size: int,
    length: int | None,
    boxed_params: Any = None,
    model: Model | None = None,
) -> None:
    """Checks mesh, rules, sizes and parameter names against each other.

    Args:
      batch_size: rows of a global batch (of a microbatch when accumulating).
      length: tokens per row; None where rows have no length.
      boxed_params: abstract parameters with their logical names, when available.
      model: model whose attention is checked, when available.

    Raises:
      ValueError: one message that lists every problem.
    """
    targets = dict(rules)
    problems = [
        f"rule for the unknown logical axis {name!r}: use a name of model/axes.py"
        for name in targets
        if name not in axes.ALL_AXES
    ]
    used = {axis for target in targets.values() for axis in _mesh_axes(target)}
    problems += [
        f"mesh axis {axis!r} has size {size}, but no rule uses it: choose another rule set or "
        "give its devices to another axis"
        for axis, size in mesh.shape.items()
        if size > 1 and axis not in used
    ]
    for name, size, what in (
        (axes.BATCH, batch_size, "BATCH_SIZE (divided by the microbatches)"),
        *([] if length is None else [(axes.LENGTH, length, "the row length")]),
        *config.axis_sizes(),
    ):
        shards = shards_of(mesh, targets.get(name))
        if size % shards:
            remedy = ""
            if name == axes.KV_HEADS and shards % size == 0:
                remedy = ": the rule sets *_whole_kv keep key/value heads whole"
            problems.append(
                f"{what} = {size} is not a multiple of the {shards} shards of {name!r}{remedy}"
            )
    if boxed_params is not None:
        problems += _parameter_problems(mesh, targets, boxed_params)
    if model is not None:
        problems += _attention_problems(mesh, targets, model, length, batch_size)
    if problems:
        raise ValueError(
            f"Mesh {dict(mesh.shape)} and the rule set do not fit this run:\n  - "
            + "\n  - ".join(problems)
        )


def _attention_problems(
    mesh: Mesh | AbstractMesh,
    targets: Mapping[str, Any],
    model: Model,
    length: int | None,
    batch_size: int,
) -> list[str]:
    size = shards_of(mesh, targets.get(axes.INNER_LENGTH))
    heads_by = shards_of(mesh, targets.get(axes.ACT_KV_HEADS))
    layers = model.layer_settings()
    problems = [
        f"Attention.implementation = {problem}"
        for own in {layer.attention for layer in layers}
        if (problem := method_problem(own.implementation, size, own.cache_heads // heads_by))
    ]
    if size == 1:
        return problems
    if length is None or model.row.encodes:
        problems.append("the axis 'context' splits rows of a decoder alone: use the rules 'fsdp'")
    if any(layer.mlp.experts for layer in layers):
        problems.append(
            "the axis 'context' supports no mixtures of experts, which sort the tokens of whole rows: use the rules 'fsdp_ep'"
        )
    if (rows := batch_size // shards_of(mesh, targets[axes.BATCH])) > 1:
        # The partitioner cannot split tokens of several rows evenly, and would compute their loss on every device.
        problems.append(
            f"with an axis 'context' a device has parts of one row at a time, and not of {rows}: multiply "
            f"Recipe.microbatches by {rows}"
        )
    return problems


def attention_method(mesh: Mesh, rules: Rules, model: Model) -> str:
    """Returns how attention reads the parts of rows, such as 'ring'; '' where rows are whole."""
    targets = dict(rules)
    size = shards_of(mesh, targets.get(axes.INNER_LENGTH))
    if size == 1:
        return ""
    shards = shards_of(mesh, targets.get(axes.ACT_KV_HEADS))
    layers = [layer.attention for layer in model.layer_settings()]
    methods = {method_for(own.implementation, size, own.cache_heads // shards) for own in layers}
    return " and ".join(sorted(methods))


def _parameter_problems(
    mesh: Mesh | AbstractMesh,
    targets: Mapping[str, Any],
    boxed_params: Any,
) -> list[str]:
    problems, replicated, of_experts = [], 0, set()
    settings = {
        axes.EXPERT: "num_experts",
        axes.MLP: "the width of experts (expert_dim or mlp_dim)",
    }
    for path, box in jax.tree_util.tree_leaves_with_path(boxed_params, is_leaf=axes.is_boxed):
        where = "/".join(str(key.key) for key in path)
        if not isinstance(box, nn.LogicallyPartitioned):
            problems.append(f"parameter {where} carries no logical axis names")
            continue
        unknown = [n for n in box.names if n is not None and n not in targets]
        if unknown:
            problems.append(f"parameter {where} has axes {unknown} without a rule")
            continue
        sizes = dict(zip(box.names, box.value.shape, strict=True))
        if axes.EXPERT in sizes:
            of_experts |= {(name, size) for name, size in sizes.items() if name in settings}
        targeted = [targets[name] for name in box.names if name is not None]
        if math.prod(shards_of(mesh, target) for target in targeted) == 1:
            replicated += math.prod(box.value.shape) * box.value.dtype.itemsize
    problems += [
        f"{settings[name]} = {size} is not a multiple of the {shards} shards of {name!r}"
        for name, size in sorted(of_experts)
        if size % (shards := shards_of(mesh, targets.get(name)))
    ]
    # Splitting the experts alone leaves the rest whole on purpose.
    others = (name for name in axes.PARAMETER_AXES if name != axes.EXPERT)
    splits = max(shards_of(mesh, targets.get(name)) for name in others)
    if splits > 1 and replicated > _MOST_WHOLE:
        problems.append(
            f"{replicated / 2**30:.1f} GiB of parameters would stay whole on every device; "
            "check their logical names"
        )
    return problems
