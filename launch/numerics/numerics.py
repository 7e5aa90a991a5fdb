"""Compiles a run's train step for several orders and meshes of absent chips, and compares its sums across chips."""

import collections
import dataclasses
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from espalier.common import stages
from espalier.common.spelling import few
from espalier.launch.numerics import reductions
from espalier.launch.numerics.reductions import Reduction
from espalier.launch.precompile import compile_report, precompile, programs, tpu_topology
from espalier.launch.precompile.hlo import text as hlo_text
from espalier.model import axes
from espalier.trainers import initialise, partitioning, trainable
from espalier.trainers.optim import schedules
from espalier.trainers.optim.gradient_terms import make_optimizer
from espalier.trainers.recipe import Program, Recipe

# Sums of at least so many significant bits are not warned of.
_PRECISE = 2.0**-20
_FIELDS = ("algorithm", "dtype", "terms", "combined", "backend")
_REMEDIES = (
    "--gin.DTYPE=\"'float32'\" computes products and sums of gradients in float32, in more memory and time.",
    "--gin.LORA_A_INIT=@jax.nn.initializers.zeros --gin.LORA_B_INIT=@lora.uniform_fan_in, of a run with methods/adapters/lora.gin, "
    "starts A at 0 instead of B, and its gradient may be summed in another way.",
    "A run places chips by their coordinates, in whatever order they are listed (trainers/partitioning.py): with the same slice, MESH "
    "and versions the order is always that of --orders=1.",
)


class NumericsError(ValueError):
    """Orders or meshes that are none, or a program without sums across chips that can be compared."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One order of the chips on one mesh, and the sums of the program that is compiled for it.

    Attributes:
      mesh: sizes by axis; axes of size 1 are absent.
      chips: the chips in the order in which they fill the mesh, as numbers of the slice's own order.
      program, backend: digests of the compiled program without and of its fields backend_config.
      instructions: number of instructions of the program.
    """

    mesh: Mapping[str, int]
    chips: tuple[int, ...]
    program: str
    backend: str
    instructions: int
    sums: Sequence[Reduction]

    def __str__(self) -> str:
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        return f"mesh {sizes}, chips {' '.join(map(str, self.chips))}"


def mesh_of(text: str) -> dict[str, int]:
    """Returns the mesh that a flag --mesh gives; raises NumericsError."""
    try:
        sizes = json.loads(text)
    except ValueError:
        sizes = None
    if not isinstance(sizes, dict) or any(type(size) is not int for size in sizes.values()):
        raise NumericsError(
            f'--mesh={text} is not a mesh: give sizes by axis, such as --mesh=\'{{"data": 2, "fsdp": 2}}\'.'
        )
    return sizes


def orders_of(texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Returns the orders that flags --order give; raises NumericsError."""
    for text in texts:
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
            raise NumericsError(
                f"--order={text} is not a list of chips: give numbers such as 3,2,1,0."
            )
    return [tuple(map(int, text.split(","))) for text in texts]


def numerics(
    recipe: Recipe,
    topology_name: str,
    *,
    meshes: Sequence[Mapping[str, int]] = (),
    orders: int | Sequence[Sequence[int]] | None = None,
    json_file: str | None = None,
) -> list[str]:
    """Compiles the train step of a recipe in several layouts, prints the report, and returns its warnings.

    Args:
      recipe: the recipe.
      topology_name: see `tpu_topology.parse`; one slice of several chips.
      meshes: further meshes, besides the recipe's own.
      orders: the orders of the chips, or their number for each mesh, see `orders_for`; None for two.
      json_file: path of a file to which all of the report is written too.

    Raises:
      TopologyError: the topology is unknown, or libtpu is missing.
      NumericsError: the topology has one chip or several slices, an order is no permutation, a layout is given twice, or the
        step does not fit the chips.
      ValueError: a mesh does not fit the run.
    """
    topology = tpu_topology.parse(topology_name)
    if topology.num_chips == 1:
        raise NumericsError(
            f"--topology={topology} is one chip, which sums nothing with others: give a slice."
        )
    if topology.slices > 1:
        raise NumericsError(
            f"--topology={topology} has {topology.slices} slices, and sums between slices are not read: give one slice."
        )
    wanted = [recipe, *(dataclasses.replace(recipe, mesh=mesh) for mesh in meshes)]
    orders_for(range(topology.num_chips), orders)  # an error comes before libtpu starts
    devices = list(tpu_topology.devices(topology))
    programs_of = [precompile.resolved(one, devices) for one in wanted]
    planned = [
        (program, order)
        for program in programs_of
        for order in orders_for([devices.index(d) for d in program.mesh.devices.flat], orders)
    ]
    keys = [(tuple(program.mesh.shape.items()), order) for program, order in planned]
    if len(set(keys)) < len(keys):
        raise NumericsError(
            "A layout is given twice: remove the --mesh or --order that repeats another one."
        )
    layouts = []
    for i, (program, order) in enumerate(planned):
        print(f"compiling layout {i + 1} of {len(planned)} for {topology} ...", flush=True)
        layouts.append(compiled(placed(program, [devices[chip] for chip in order]), order))
    changed = changes(layouts)
    risky = warnings(programs_of[0], layouts)
    versions = tpu_topology.versions()
    document = {
        "topology": str(topology),
        "versions": versions,
        "layouts": [
            {
                **dataclasses.asdict(one),
                "sums": [{**dataclasses.asdict(s), "bound": s.bound} for s in one.sums],
            }
            for one in layouts
        ],
        "changes": changed,
        "warnings": risky,
        "remedies": list(_REMEDIES) if risky else [],
    }
    print(report(versions, layouts, changed, risky))
    if json_file:
        precompile.write_json(json_file, document)
    return risky


def orders_for(
    own: Sequence[int], orders: int | Sequence[Sequence[int]] | None
) -> list[tuple[int, ...]]:
    """Returns orders of chips: those that are given, or so many of the own order, its reverse, and random ones.

    Raises:
      NumericsError: fewer than one, more than there are, or one that does not have each chip once.
    """
    if isinstance(orders, Sequence):
        for order in orders:
            if sorted(order) != list(range(len(own))):
                raise NumericsError(
                    f"--order={','.join(map(str, order))} is no order of {len(own)} chips: give each number from 0 to "
                    f"{len(own) - 1} once."
                )
        return [tuple(order) for order in orders]
    count = 2 if orders is None else orders
    if not 1 <= count <= math.factorial(len(own)):
        raise NumericsError(
            f"--orders={count}: {len(own)} chips have 1 to {math.factorial(len(own)):,} orders; give a number of these."
        )
    found = dict.fromkeys([tuple(own), tuple(reversed(own))][:count])
    draw = random.Random(0)
    while len(found) < count:
        found[tuple(draw.sample(list(own), len(own)))] = None
    return list(found)


def placed(program: Program, devices: Sequence[jax.Device]) -> Program:
    """Returns a program on the same mesh with these devices in its places, the last axis fastest."""
    grid = np.array(devices, dtype=object).reshape(program.mesh.devices.shape)
    mesh = Mesh(grid, program.mesh.axis_names, axis_types=program.mesh.axis_types)

    def moved(sharding: Any) -> NamedSharding:
        return NamedSharding(mesh, sharding.spec)

    state = program.abstract_state
    return dataclasses.replace(
        program,
        mesh=mesh,
        abstract_state=initialise.with_shardings(
            state, jax.tree.map(lambda x: moved(x.sharding), state)
        ),
        batch_sharding=moved(program.batch_sharding),
    )


def compiled(program: Program, order: Sequence[int]) -> Layout:
    """Returns the layout of a program, whose train step is compiled; raises NumericsError if it does not fit."""
    work = programs.train(program)
    with partitioning.use_mesh(program.mesh, program.rules):
        with stages.stage("tracing"):
            traced = work.function.trace(*work.arguments)
        try:
            with stages.stage("compiling"):
                text = traced.lower().compile().as_text()
        except jax.errors.JaxRuntimeError as error:
            if compile_report.out_of_memory(str(error)) is None:
                raise
            raise NumericsError(
                "The step does not fit the chips: espalier precompile finds what does."
            ) from None
    module = hlo_text.parse(text)
    outputs = jax.tree_util.tree_leaves_with_path(traced.out_info)
    if len(outputs) != len(tuple(hlo_text.leaves(module.entry.result.shape))):
        raise hlo_text.HloError(f"the program has not the {len(outputs)} results of the train step")
    # From short to long, so that of two paths that end alike the longer one remains.
    gradients = {
        i: path
        for path in sorted(_trained(program), key=len)
        for i, (keys, _) in enumerate(outputs)
        if f"/{trainable.path_name(keys)}".endswith(f"/{path}")
    }
    lines = [
        # Names of source files and positions in them are no part of what is computed.
        re.sub(r"(, )?metadata=\{[^{}]*\}", "", line).partition(", backend_config=")
        for line in text.splitlines()
        if " = " in line
    ]
    return Layout(
        mesh={axis: size for axis, size in program.mesh.shape.items() if size > 1},
        chips=tuple(order),
        program=_digest(line[0] for line in lines),
        backend=_digest(line[2] for line in lines),
        instructions=sum(len(one.instructions) for one in module.computations.values()),
        sums=reductions.read(module, gradients),
    )


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def _trained(program: Program) -> list[str]:
    """Returns the paths of the trained parameters."""
    trained, _ = trainable.split(program.abstract_state.params, program.mask)
    return [trainable.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)]


def changes(layouts: Sequence[Layout]) -> list[dict[str, Any]]:
    """Returns what of a sum differs between the orders of one mesh, or between the first orders of two meshes.

    Each difference has the numbers of the layouts from 1, the name of the sum, the field, and its values in each layout.
    """
    meshes: dict[str, list[int]] = collections.defaultdict(list)
    for i, layout in enumerate(layouts):
        meshes[json.dumps(layout.mesh)].append(i)
    found = []
    for compared in [*meshes.values(), [same[0] for same in meshes.values()]]:
        facts: list[dict[str, list[Reduction]]] = []
        for i in compared:
            facts.append(collections.defaultdict(list))
            for one in layouts[i].sums:
                facts[-1][one.of].append(one)
        for of in sorted(set().union(*facts)):
            for field in _FIELDS:
                values = [sorted({getattr(one, field) for one in sums[of]}) for sums in facts]
                if any(value != values[0] for value in values):
                    numbers = [i + 1 for i in compared]
                    found.append({"layouts": numbers, "of": of, "field": field, "values": values})
    return found


def warnings(program: Program, layouts: Sequence[Layout]) -> list[str]:
    """Returns a sentence for each way of summing in which rounding can decide the first update of adapters that start at 0."""
    risky: dict[str, list[_Gradient]] = collections.defaultdict(list)
    for layout in layouts:
        for gradient in _gradients(layout):
            # A sum of two is rounded once, in either order.
            if gradient.terms > 2 and gradient.roundoff > _PRECISE:
                risky[gradient.of].append(gradient)
    zeros = _zero_starts(program) if risky else set()
    risky = {of: ones for of, ones in risky.items() if set(of.split(" + ")) & zeros}
    if not risky or not is_scale_free(program):
        return []
    changed = {one["of"] for one in changes(layouts)}
    groups: dict[tuple[Any, ...], list[str]] = collections.defaultdict(list)
    for of, ones in sorted(risky.items()):
        worst = max(ones, key=lambda one: one.bound)
        ways = ", ".join(sorted({way for one in ones for way in one.algorithms}))
        groups[worst.dtype, worst.terms, worst.bound, ways, of in changed].append(of)
    same = " How it is summed is the same in these layouts." if len(layouts) > 1 else ""
    return [
        f"adapters that start at 0: {few(names, 2)}. The first update follows the sign of each gradient, whatever its size. The gradient is "
        f"summed in {dtype} over {terms} chips ({ways}) and errs by up to {bound:.2g} of the sum of its terms' sizes: where terms cancel, "
        f"rounding decides the sign.{' How it is summed differs between these layouts.' if differs else same}"
        for (dtype, terms, bound, ways, differs), names in groups.items()
    ]


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """All sums of a parameter's gradient in one layout, which may follow each other: over one axis of the mesh, then another."""

    of: str
    dtype: str
    roundoff: float
    terms: int
    bound: float
    algorithms: tuple[str, ...]


def _gradients(layout: Layout) -> Iterator[_Gradient]:
    by_name: dict[str, list[Reduction]] = collections.defaultdict(list)
    for one in layout.sums:
        by_name[one.of].append(one)
    for of, sums in by_name.items():
        narrowest = max(sums, key=lambda one: reductions.unit_roundoff(one.dtype))
        yield _Gradient(
            of=of,
            dtype=narrowest.dtype,
            roundoff=reductions.unit_roundoff(narrowest.dtype),
            terms=min(math.prod(one.terms for one in sums), len(layout.chips)),
            bound=math.prod(1 + one.bound for one in sums) - 1,
            algorithms=tuple(one.algorithm for one in sums),
        )


def _zero_starts(program: Program) -> set[str]:
    """Returns the trained parameters that are drawn as zeros, of a run that trains only a part; they are drawn on this host."""
    recipe = program.recipe
    if not recipe.trainable:
        return set()

    def any_nonzero() -> dict[str, jax.Array]:
        boxed = initialise.variables(recipe.model, jax.random.key(0), recipe.inputs_spec)["params"]
        params = jax.tree.map(axes.unboxed, boxed, is_leaf=axes.is_boxed)
        trained, _ = trainable.split(params, program.mask)
        return {
            trainable.path_name(path): jnp.any(leaf != 0)
            for path, leaf in jax.tree_util.tree_leaves_with_path(trained)
        }

    with stages.stage("drawing the trained parameters"):
        return {path for path, drawn in jax.jit(any_nonzero)().items() if not drawn}


def is_scale_free(program: Program) -> bool:
    """Whether the optimiser's first update of a gradient and of a thousandth of it are about as large, as Adam's and Lion's are."""
    shapes = initialise.shapes_of(program.boxed_params)
    trained, _ = trainable.split(shapes, program.mask)
    optimizer = make_optimizer(
        program.recipe.optimizer,
        learning_rate=schedules.as_schedule(1.0),
        boxed_params=program.boxed_params,
        terms=program.recipe.gradient_terms,
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(trained))

    def first_update(norm: float) -> jax.Array:
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), trained)
        gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, norm / math.sqrt(size)), params)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return optax.tree.norm(updates)

    # Below the norms at which gradients are usually clipped.
    large, small = (float(jax.jit(first_update, static_argnums=0)(norm)) for norm in (0.5, 5e-4))
    return small > 0.5 * large


def report(
    versions: Mapping[str, str],
    layouts: Sequence[Layout],
    changed: Sequence[Mapping[str, Any]],
    risky: Sequence[str],
) -> str:
    """Returns the report as text; parameters with like sums share a line."""
    lines = [
        f"compiled with {', '.join(f'{name} {version}' for name, version in versions.items())}"
    ]
    for i, layout in enumerate(layouts):
        lines += ["", f"layout {i + 1}: {layout}"]
        lines += [
            f"  program {layout.program} of {layout.instructions:,} instructions, backend_config {layout.backend}"
        ]
        same = next((k for k in range(i) if layouts[k].sums == layout.sums), None)
        if same is not None:
            lines.append(f"  sums as in layout {same + 1}")
            continue
        groups: dict[tuple[Any, ...], list[str]] = collections.defaultdict(list)
        for one in layout.sums:
            way = (
                one.algorithm
                if len(one.combined) == 1
                else f"{one.algorithm} of {len(one.combined)}"
            )
            groups[one.dtype, one.terms, way, one.bound, one.combined[1:]].append(one.of)
        lines.append(f"  {'dtype':<6}{'terms':>5}  {'error':>7}  {'algorithm':<20}  sum of")
        for (dtype, terms, way, bound, _), names in groups.items():
            lines.append(f"  {dtype:<6}{terms:>5}  {bound:>7.2g}  {way:<20}  {few(names, 2)}")
    lines += ["", "error: at most this multiple of the sum of the terms' sizes, in any order"]
    differing: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for change in changed:
        compared = " and ".join(map(str, change["layouts"]))
        differing[compared, change["field"]].append(change["of"])
    for (compared, field), names in differing.items():
        lines.append(f"layouts {compared} differ in {field}: {few(names, 2)}")
    if len(layouts) > 1 and not changed:
        lines.append("no sum differs between these layouts")
    for warning in risky:
        lines += ["", f"WARNING: {warning}"]
    lines += ["", "remedies:", *(f"  - {one}" for one in _REMEDIES)] if risky else []
    return "\n".join(lines)
