"""The layouts of a run on a topology: meshes, rule sets and rematerialisation that fit together."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax

from espalier.launch.precompile import precompile, tpu_topology
from espalier.launch.precompile.tpu_topology import Topology
from espalier.model import axes
from espalier.model.config import REMAT_POLICIES
from espalier.trainers import initialise, partitioning
from espalier.trainers.recipe import Recipe

# From the least memory to the most.
_REMATS = ("full", "dots", "none")
assert set(_REMATS) == set(REMAT_POLICIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings that a search changes in a run.

    Attributes:
      batch_size: rows of a global batch.
      mesh: sizes by axis; axes of size 1 are absent.
      rules: name of a rule set.
      remat: None for a model without the setting.
      argument_bytes: memory of a chip for state and batch, which no layout of activations changes.
    """

    batch_size: int
    mesh: tuple[tuple[str, int], ...]
    rules: str
    remat: str | None
    argument_bytes: int

    @property
    def words(self) -> list[str]:
        """The flags that set it."""
        words = [
            f"--gin.BATCH_SIZE={self.batch_size}",
            f"--gin.MESH={json.dumps(dict(self.mesh))}",
            f"--gin.recipe.Recipe.rules='{self.rules}'",
        ]
        if self.remat is not None:
            words.append(f"--gin.config.TransformerConfig.remat='{self.remat}'")
        return words

    def __str__(self) -> str:
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.mesh) or "one chip"
        remat = "" if self.remat is None else f", remat {self.remat}"
        return f"{self.batch_size} rows, {sizes}, {self.rules}{remat}"


def of_recipe(recipe: Recipe, topology: Topology, batch_size: int) -> Candidate:
    """Returns the recipe's own layout with another batch size; raises ValueError if they do not fit together."""
    resized = dataclasses.replace(recipe, batch_size=batch_size)
    program = precompile.resolved(resized, tpu_topology.devices(topology))
    sizes = tuple((axis, size) for axis, size in program.mesh.shape.items() if size > 1)
    batch = program.recipe.abstract_batch(program.batch_sharding)
    return Candidate(
        batch_size=batch_size,
        mesh=sizes,
        rules=recipe.rules,
        remat=getattr(recipe.model.config, "remat", None),
        argument_bytes=precompile.argument_bytes((program.abstract_state, batch)),
    )


def batch_unit(recipe: Recipe, topology: Topology) -> int:
    """Returns the smallest batch size of a recipe's layout, of which all others are multiples."""
    sizes = dict(
        zip(
            partitioning.MESH_AXES,
            partitioning.mesh_sizes(recipe.mesh, topology.num_chips),
            strict=True,
        )
    )
    target = dict(partitioning.rules_named(recipe.rules))[axes.BATCH]
    shards = 1
    for axis in (target,) if isinstance(target, str) else target or ():
        shards *= sizes[axis]
    return shards * recipe.microbatches


def layouts(recipe: Recipe, topology: Topology) -> list[Candidate]:
    """Returns all layouts of a recipe's batch on a topology, those that need the least memory for activations first.

    Slices are copies of the model (`data`). Within a slice, an axis other than fsdp has a power of two as its size. A
    layout whose mesh does not divide the model or the batch is not among them.
    """
    remats: tuple[str | None, ...] = (None,)
    if hasattr(recipe.model.config, "remat"):
        remats = _REMATS
    fitting: list[Candidate] = []
    for mesh, rules in _splits(topology, experts=_has_experts(recipe)):
        plain = (tuple(mesh.items()), rules.removesuffix("_whole_kv"))
        if rules.endswith("_whole_kv") and plain in {(one.mesh, one.rules) for one in fitting}:
            continue  # heads can be split, so that copies of them are of no use
        changed = dataclasses.replace(recipe, mesh=mesh, rules=rules)
        try:
            fitting.append(of_recipe(changed, topology, recipe.batch_size))
        except ValueError:
            continue
    return [dataclasses.replace(one, remat=remat) for remat in remats for one in fitting]


def _has_experts(recipe: Recipe) -> bool:
    boxed = initialise.abstract_variables(recipe.model, recipe.inputs_spec)["params"]
    return any(axes.EXPERT in box.names for box in jax.tree.leaves(boxed, is_leaf=axes.is_boxed))


def _splits(topology: Topology, *, experts: bool) -> Iterator[tuple[dict[str, int], str]]:
    """Yields meshes, each with the rule sets that use exactly its axes; an axis of experts only with `experts`."""
    chips = topology.num_chips // topology.slices
    between = {"data": topology.slices} if topology.slices > 1 else {}
    meshes: list[dict[str, int]] = [{"data": topology.num_chips}]
    size = 1
    while chips % size == 0 and size <= chips:
        for axis in ("tensor", "expert") if experts else ("tensor",):
            if size > 1 or axis == "tensor":
                sizes = {"fsdp": chips // size, axis: size}
                meshes.append(between | {a: s for a, s in sizes.items() if s > 1})
        size *= 2
    for mesh in meshes:
        for name, rules in partitioning.RULE_SETS.items():
            used = _axes_used(rules)
            if set(mesh) - {"data"} == used:
                yield mesh, name


def _axes_used(rules: Any) -> set[str]:
    """Returns the mesh axes that a rule set gives to parameters or activations, apart from `data`.

    The rules of the batch name `fsdp` in every rule set, so what counts is the others.
    """
    used: set[str] = set()
    for name, target in rules:
        if name not in (axes.BATCH, axes.LOOKUP_BATCH) and target is not None:
            used |= {target} if isinstance(target, str) else set(target)
    return used - {"data"}
