"""Restores the parameters of a checkpoint into a model, all of them or by path pattern.

A checkpoint may store a model's layers in another layout. Scanned, a block has a leading axis of its layers, which
model/layer_groups.py divides: with a period P, row g of layers/block_p is layer g * P + p. Unrolled, layers/block_i is layer i.
A run may read layers in other groups (`layer_pattern`), or scan layers that were saved unrolled.
"""

import collections
import dataclasses
import difflib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from espalier.model import layer_groups
from espalier.trainers import trainable
from espalier.trainers.checkpoints import base_step, state_tree, step_dir
from espalier.trainers.checkpoints.array_files import read_verified, sharding_of
from espalier.trainers.checkpoints.manifest import ArrayEntry, Manifest

_log = logging.getLogger(__name__)
# Fact of a checkpoint: the name of its model's part for inference (model/protocol.py), without which a model that has no
# further heads names the parameters.
INFERENCE_PART = "inference_part"
# Pairs (pattern for a whole path of the model, path in the checkpoint or None for the initial value). The path may
# refer to groups of the pattern: (r"layers/block_0/(.*)", r"layers/block_3/\1").
Assignment = Sequence[tuple[str, str | None]]


@dataclasses.dataclass(frozen=True)
class Saved:
    """An array of the model, in a checkpoint.

    Attributes:
      entry: shape and dtype, in the model's layout if the array is made of layers.
      parts: (array in the checkpoint, its row or None for the whole array), one for each layer.
      stacked: whether the parts are rows of the array; otherwise there is one, which is the array.
    """

    entry: ArrayEntry
    parts: tuple[tuple[str, int | None], ...]
    stacked: bool = False

    @property
    def moved(self) -> bool:
        """Whether the checkpoint has the array's layers in another layout."""
        return self.stacked or self.parts[0][1] is not None

    def array(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the array, from those of the checkpoint by name."""
        values = [arrays[name] if row is None else arrays[name][row] for name, row in self.parts]
        return jnp.stack(values) if self.stacked else values[0]

    def abstract_parts(
        self, like: Any, saved: Mapping[str, ArrayEntry]
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the arrays to read, by name; a layer is split over devices as in `like`."""
        sharding = sharding_of(like)
        layer_rank = len(self.entry.shape) - self.stacked
        wanted = {}
        for name, _ in self.parts:
            entry, split = saved[name], sharding
            if self.moved and isinstance(sharding, NamedSharding):
                spec = (*sharding.spec, *(None,) * (len(like.shape) - len(sharding.spec)))
                whole = (None,) * (len(entry.shape) - layer_rank)
                of_layer = spec[len(spec) - layer_rank :]
                split = NamedSharding(sharding.mesh, PartitionSpec(*whole, *of_layer))
            dtype = jnp.dtype(entry.dtype)
            wanted[name] = jax.ShapeDtypeStruct(entry.shape, dtype, sharding=split)
        return wanted


class ComputedCheckpoint(Protocol):
    """A checkpoint that is computed from others while it is read, an array at a time; no step directory has it.

    Attributes:
      steps: step directories of the checkpoints; `meta` begins with the facts of the first.
      meta: JSON facts, as a step's record has them.
      entries: shapes and dtypes of its parameters, by path.
    """

    steps: Sequence[epath.Path]
    meta: Mapping[str, Any]
    entries: Mapping[str, ArrayEntry]

    def read(self, name: str) -> np.ndarray:
        """Returns the values of one of `entries`, which every process computes."""
        ...

    def table(self) -> list[str]:
        """Returns lines on how every parameter is computed."""
        ...


class SavedArrays:
    """The arrays of a checkpoint, by the names of a model that may have another layout.

    Args:
      entries: the checkpoint's arrays by name.
      wanted: the shapes of all arrays that will be looked up, by name: they show the model's layout.
    """

    def __init__(self, entries: Mapping[str, ArrayEntry], wanted: Mapping[str, tuple[int, ...]]):
        self.entries = entries
        theirs = _shapes_in_blocks({name: entry.shape for name, entry in entries.items()})
        ours = _shapes_in_blocks(wanted)
        self._layouts = {
            stack: layouts
            for stack in {*theirs} & {*ours}
            if (layouts := _layouts(theirs[stack], ours[stack])) is not None
        }

    def find(self, name: str, shape: tuple[int, ...]) -> Saved | None:
        """Returns an array of this shape; None if the checkpoint lacks it, one of another shape if it has only that."""
        entry = self.entries.get(name)
        whole = None if entry is None else Saved(entry, ((name, None),))
        match = layer_groups.BLOCK.fullmatch(name)
        if match is None or match[1] not in self._layouts:
            return whole
        if entry is not None and entry.shape == shape and self._same(match[1], int(match[2])):
            return whole
        return self._moved(match[1], int(match[2]), match[3], shape) or whole

    def _same(self, stack: str, block: int) -> bool:
        """Returns whether a block has the same layers in both layouts."""
        theirs, ours = self._layouts[stack]
        return theirs.scanned == ours.scanned and theirs.layers(block) == ours.layers(block)

    def _moved(self, stack: str, block: int, rest: str, shape: tuple[int, ...]) -> Saved | None:
        theirs, ours = self._layouts[stack]
        layer_shape = shape[1:] if ours.scanned else shape
        parts, dtypes = [], set()
        for layer in ours.layers(block):
            source, index = layer_groups.place(theirs.groups, layer)
            name = f"{stack}/block_{source}/{rest}"
            entry = self.entries.get(name)
            if entry is None or entry.shape[theirs.scanned :] != layer_shape:
                return None
            parts.append((name, index if theirs.scanned else None))
            dtypes.add(entry.dtype)
        if len(dtypes) != 1 or (ours.scanned and shape[:1] != (len(parts),)):
            return None
        entry = dataclasses.replace(self.entries[parts[0][0]], shape=shape)
        return Saved(entry, tuple(parts), ours.scanned)


class _Layout(NamedTuple):
    """The layout of a stack of layers: the blocks' groups, and whether a block has an axis of layers."""

    groups: tuple[layer_groups.Group, ...]
    scanned: bool

    def layers(self, block: int) -> range:
        return layer_groups.layers_of(self.groups, block)


# The shapes of a stack's arrays, by path in a block and number of the block.
_InBlocks = dict[str, dict[int, tuple[int, ...]]]


def _shapes_in_blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _InBlocks]:
    """Returns the shapes of each stack of layers."""
    stacks: dict[str, _InBlocks] = {}
    for name, shape in shapes.items():
        if match := layer_groups.BLOCK.fullmatch(name):
            stacks.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = shape
    return stacks


def _layouts(theirs: _InBlocks, ours: _InBlocks) -> tuple[_Layout, _Layout] | None:
    """Returns the layouts of two stacks; None if they are not of the same layers.

    An array that all blocks have on both sides shows which side has an axis of layers: the one with one axis more.
    """
    both = [rest for rest in theirs if _in_all(rest, theirs) and _in_all(rest, ours)]
    # Those of fewest axes first, such as norms, which no method stacks otherwise.
    for rest in sorted(both, key=lambda rest: len(next(iter(theirs[rest].values())))):
        there, here = theirs[rest], ours[rest]
        more = len(next(iter(there.values()))) - len(next(iter(here.values())))
        # With as many axes, both are scanned, or blocks are the same layers anyway.
        layouts = _layout(there, scanned=more >= 0), _layout(here, scanned=more <= 0)
        if layouts[0].groups[-1].end == layouts[1].groups[-1].end:
            return layouts
    return None


def _in_all(rest: str, stack: _InBlocks) -> bool:
    return rest in stack and len(stack[rest]) == max(map(len, stack.values()))


def _layout(shapes: Mapping[int, tuple[int, ...]], *, scanned: bool) -> _Layout:
    repeats = {block: shape[0] if scanned else 1 for block, shape in shapes.items()}
    return _Layout(layer_groups.inferred(repeats), scanned)


class CheckpointMismatchError(ValueError):
    """The arrays of a checkpoint do not fit the model."""


def list_differences(differences: Sequence[str]) -> str:
    """Returns the first difference and the number of further differences."""
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    return f"{differences[0]}{more}"


def describe(leaf: Any) -> str:
    """Returns dtype and shape as manifests print them: `float32[8, 16]`."""
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _nearest(name: str, names: Sequence[str]) -> str:
    below = [other for other in names if other.endswith(f"/{name}")]
    close = below[:1] or difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _assign(
    path: epath.Path,
    wanted: state_tree.Flat,
    entries: Mapping[str, ArrayEntry],
    assignment: Assignment,
    strict: bool,
    added: Sequence[str],
    root_of: Callable[[epath.Path], str],
) -> dict[str, Saved | None]:
    """Returns where the checkpoint has each parameter of the model; None to use its initial value."""
    names: dict[str, str | None] = {}
    unused = {pattern for pattern, _ in assignment}
    for name in wanted:
        names[name] = name
        for pattern, target in assignment:
            if match := trainable.expression(pattern, what="assignment pattern").fullmatch(name):
                unused.discard(pattern)
                names[name] = None if target is None else match.expand(target)
                break
    if unused:
        first = sorted(unused)[0]
        raise ValueError(
            f"assignment pattern {first!r} matches no parameter of the model"
            f"{_nearest(first, list(wanted))}."
        )
    given = [name for name in names.values() if name is not None]
    root = "" if set(given) <= set(entries) else root_of(path)
    root = "" if any(name.startswith(root) for name in given) else root
    shapes = {
        root + source: tuple(wanted[name].shape)
        for name, source in names.items()
        if source is not None
    }
    saved = SavedArrays(entries, shapes)
    sources: dict[str, Saved | None] = {}
    missing = []
    for name, source in names.items():
        sources[name] = None
        if source is None:
            continue
        sources[name] = saved.find(root + source, tuple(wanted[name].shape))
        if sources[name] is None and not is_added(name, added):
            if source != name:
                missing.append(f"{source} (assigned to {name})")
            elif strict:
                missing.append(name)
    if missing:
        raise CheckpointMismatchError(
            f"checkpoint {path} lacks {list_differences(missing)}"
            f"{_nearest(missing[0].split(' ')[0], list(entries))}. Assign other parameters or None to "
            "these, or pass strict=False, to start them from their initial values."
        )
    used = {name for source in sources.values() if source is not None for name, _ in source.parts}
    known = {root + name for name in wanted}
    extra = sorted(name for name in set(entries) - known - used if name.startswith(root))
    if strict and extra:
        raise CheckpointMismatchError(
            f"checkpoint {path} has parameters that the model does not: {list_differences(extra)}. "
            "Assign them to parameters of the model, or pass strict=False to ignore them."
        )
    if any(source is not None and source.moved for source in sources.values()):
        _log.info("%s: its layers are stored in another layout than the model's", path)
    return sources


def _inference_root(step: epath.Path) -> str:
    """Returns what paths in the checkpoint's part for inference begin with, such as 'backbone/'."""
    part = step_dir.read_record(step)["meta"].get(INFERENCE_PART, "")
    return part and f"{part}/"


def is_added(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether a checkpoint may lack a parameter: its path matches one of the patterns."""
    return any(trainable.expression(p, what="added pattern").fullmatch(name) for p in patterns)


def restore_params(
    path: str | os.PathLike,
    abstract_params: Any,
    *,
    assignment: Assignment = (),
    strict: bool = True,
    use_ema: bool = False,
    added: Sequence[str] = (),
    computed: ComputedCheckpoint | None = None,
    finish: Callable[[str, jax.Array], state_tree.Flat] | None = None,
) -> Any:
    """Returns parameters of a checkpoint with the shardings and dtypes of `abstract_params`.

    Args:
      path: a step directory, or a run directory for its newest good step.
      abstract_params: jax.ShapeDtypeStruct with shardings; arrays for parameters that may use their
        initial value, because they are assigned to None, or are missing and `strict` is False.
      assignment: the first pattern that matches the whole path of a parameter decides. Parameters without a
        matching pattern are read from their own path.
      strict: whether every parameter of the model must be saved or assigned, and every saved parameter
        must be in the model.
      use_ema: whether to read the moving average instead of the parameters.
      added: patterns of parameters that keep their initial values if the checkpoint lacks them, such as adapters.
      computed: parameters to take instead of those of `path`, which is then only named in messages.
      finish: returns the arrays by path that replace a parameter. Parameters are then read and replaced one by one, unless the
        checkpoint has layers in another layout, and the result is nested dicts.

    Raises:
      DamagedCheckpointError, CheckpointMismatchError, FileNotFoundError, BaseModelError.
      ValueError: an assignment pattern matches no parameter; a pattern is no regular expression.
    """
    params = state_tree.flatten(abstract_params)

    def placed(
        step: epath.Path,
        saved: Mapping[str, ArrayEntry],
        read: Callable[[state_tree.Flat], state_tree.Flat],
        root_of: Callable[[epath.Path], str],
    ) -> Any:
        sources = _assign(step, params, saved, assignment, strict, added, root_of)
        wanted = _wanted(step, params, saved, sources, added)
        moved = any(source is not None and source.moved for source in sources.values())
        whole = finish is None or moved
        arrays = read(wanted) if whole else {}
        flat: state_tree.Flat = {}
        uses = collections.Counter(sources.values())
        for name, source in sources.items():
            if source is None:
                flat[name] = params[name]
                continue
            if not whole:
                arrays = read({part: wanted[part] for part, _ in source.parts})
            value = source.array(arrays).astype(params[name].dtype)
            if uses[source] > 1:  # A buffer can be donated only once.
                value = jnp.copy(value)
            value = jax.device_put(value, sharding_of(params[name]))
            flat |= {name: value} if finish is None else finish(name, value)
        if finish is not None:
            return state_tree.nest(flat)
        return state_tree.unflatten(flat, abstract_params)

    def read(step: epath.Path) -> Any:
        which = "ema" if use_ema else "raw"
        parts = base_step.parts(step, step_dir.read_manifest(step), which)
        if not parts[0].entries:
            raise CheckpointMismatchError(
                f"checkpoint {step} holds no {parts[0].root.rstrip('/')}."
            )
        checked: set[epath.Path] = set()

        def arrays_of(wanted: state_tree.Flat) -> state_tree.Flat:
            arrays: state_tree.Flat = {}
            for part in parts:
                own = {part.root + name: x for name, x in wanted.items() if name in part.entries}
                if own:
                    files = part.step not in checked
                    reads = read_verified(part.step, part.recorded, own, files=files)
                    checked.add(part.step)
                    arrays |= {name.removeprefix(part.root): x for name, x in reads.items()}
            return arrays

        saved = {name: entry for part in parts for name, entry in part.entries.items()}
        return placed(step, saved, arrays_of, _inference_root)

    if computed is None:
        return step_dir.newest_good(path, read)

    def computed_arrays(wanted: state_tree.Flat) -> state_tree.Flat:
        # One array after the other: no process has the whole checkpoint in its memory.
        arrays = {}
        for name, leaf in wanted.items():
            values = computed.read(name)
            arrays[name] = jax.make_array_from_callback(
                leaf.shape, sharding_of(leaf), values.__getitem__
            )
        return arrays

    return placed(epath.Path(path), computed.entries, computed_arrays, lambda _: "")


def _wanted(
    path: epath.Path,
    params: state_tree.Flat,
    saved: Mapping[str, ArrayEntry],
    sources: Mapping[str, Saved | None],
    added: Sequence[str],
) -> state_tree.Flat:
    """Returns the abstract arrays to read from a step, by saved name, after checks of shapes and dtypes.

    Parameters that keep their initial values are named in a warning, unless they are declared as added.
    """
    wanted: state_tree.Flat = {}
    differences = []
    for name, source in sources.items():
        leaf = params[name]
        if source is None:
            if not isinstance(leaf, jax.Array):
                raise ValueError(
                    f"{name} should have its initial value, but has none: pass initialised "
                    "parameters where the checkpoint has no values."
                )
            continue
        entry = source.entry
        castable = all(jnp.issubdtype(jnp.dtype(x.dtype), jnp.floating) for x in (entry, leaf))
        if entry.shape != leaf.shape or (str(entry) != describe(leaf) and not castable):
            there = source.parts[0][0]
            as_source = "" if there == name else f" (as {there})"
            differences.append(
                f"{name}: the checkpoint has {entry}{as_source}, the model {describe(leaf)}"
            )
            continue
        wanted |= source.abstract_parts(leaf, saved)
    if differences:
        raise CheckpointMismatchError(
            f"checkpoint {path} is of another model: {list_differences(differences)}. Use the model "
            "configuration it was saved with, or assign these parameters to None."
        )
    kept = (name for name, source in sources.items() if source is None)
    if fresh := sorted(name for name in kept if not is_added(name, added)):
        shown = ", ".join(fresh[:3]) + ", ..." * (len(fresh) > 3)
        _log.warning("%s: %d parameters keep their initial values: %s", path, len(fresh), shown)
    return wanted


def restore_variables(step: epath.Path, variables: Any) -> Any:
    """Returns a model's other collections, such as batch statistics, restored from a step.

    Arrays that the checkpoint does not have are taken from `variables`, the collections of a fresh state.

    Raises:
      DamagedCheckpointError.
    """
    recorded = step_dir.read_manifest(step)
    fresh = state_tree.flatten({"variables": variables})
    wanted = {
        name: as_saved(recorded, name, leaf)
        for name, leaf in fresh.items()
        if name in recorded.arrays and recorded.arrays[name].shape == leaf.shape
    }
    saved = read_verified(step, recorded, wanted) if wanted else {}
    return state_tree.unflatten({**fresh, **saved}, {"variables": variables})["variables"]


def as_saved(recorded: Manifest, name: str, like: Any) -> jax.ShapeDtypeStruct:
    """Returns the abstract array of a checkpoint, with the shape and sharding of `like`.

    Raises:
      CheckpointMismatchError: the checkpoint has no such array, or one of another shape.
    """
    if name not in recorded.arrays:
        raise CheckpointMismatchError(f"the checkpoint has no array {name}.")
    entry = recorded.arrays[name]
    if entry.shape != like.shape:
        raise CheckpointMismatchError(
            f"the checkpoint has {entry} for {name}, the model {describe(like)}."
        )
    return jax.ShapeDtypeStruct(like.shape, jnp.dtype(entry.dtype), sharding=sharding_of(like))
