"""Restores the parameters of a checkpoint into a model, all of them or by path pattern.

A checkpoint may store a model's layers in another layout. Scanned with a period P, layers/block_p has a leading axis, whose
row g is layer g * P + p. Unrolled, layers/block_i is layer i. A run may read layers with another period (`layer_pattern`), or
scan layers that were saved unrolled.
"""

import collections
import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from espalier.trainers.checkpoints import base_step, state_tree, step_dir
from espalier.trainers.checkpoints.array_files import read_arrays, read_verified, sharding_of
from espalier.trainers.checkpoints.manifest import ArrayEntry, Manifest

_BLOCK = re.compile(r"((?:.*/)?layers)/block_(\d+)/(.+)")
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


class SavedArrays:
    """The arrays of a checkpoint, by the names of a model that may have another layout.

    Args:
      entries: the checkpoint's arrays by name.
      names: all names that will be looked up: they tell the model's layout.
    """

    def __init__(self, entries: Mapping[str, ArrayEntry], names: Iterable[str]):
        self.entries = entries
        self._blocks: dict[tuple[str, str], dict[int, str]] = {}  # by stack and path in a block
        self._periods = _periods(entries), _periods(names)
        for name in entries:
            if match := _BLOCK.fullmatch(name):
                self._blocks.setdefault((match[1], match[3]), {})[int(match[2])] = name

    def find(self, name: str, shape: tuple[int, ...]) -> Saved | None:
        """Returns an array of this shape; None if the checkpoint lacks it, one of another shape if it has only that."""
        entry = self.entries.get(name)
        whole = None if entry is None else Saved(entry, ((name, None),))
        if entry is not None and entry.shape == shape:
            return whole
        match = _BLOCK.fullmatch(name)
        moved = match and self._moved(match[1], int(match[2]), match[3], shape)
        return moved or whole

    def _moved(self, stack: str, block: int, rest: str, shape: tuple[int, ...]) -> Saved | None:
        blocks = self._blocks.get((stack, rest))
        if not blocks:
            return None
        theirs, ours = (periods[stack] for periods in self._periods)
        entry = self.entries[next(iter(blocks.values()))]
        layer = entry.shape if len(entry.shape) < len(shape) else entry.shape[1:]
        unrolled, stacked = len(entry.shape) == len(layer), len(shape) > len(layer)
        count = theirs if unrolled else theirs * entry.shape[0]
        if (
            count != (ours * shape[0] if stacked else ours)
            or shape[len(shape) - len(layer) :] != layer
        ):
            return None
        parts = []
        for i in range(block, count if stacked else block + 1, ours):
            source = blocks.get(i if unrolled else i % theirs)
            if source is None or self.entries[source].shape != entry.shape:
                return None
            parts.append((source, None if unrolled else i // theirs))
        return Saved(dataclasses.replace(entry, shape=shape), tuple(parts), stacked)


def _periods(names: Iterable[str]) -> dict[str, int]:
    """Returns the number of blocks of each stack of layers."""
    periods: dict[str, int] = {}
    for match in filter(None, map(_BLOCK.fullmatch, names)):
        periods[match[1]] = max(periods.get(match[1], 0), int(match[2]) + 1)
    return periods


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
) -> dict[str, Saved | None]:
    """Returns where the checkpoint has each parameter of the model; None to use its initial value."""
    names: dict[str, str | None] = {}
    unused = {pattern for pattern, _ in assignment}
    for name in wanted:
        names[name] = name
        for pattern, target in assignment:
            if match := re.fullmatch(pattern, name):
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
    root = "" if set(given) <= set(entries) else _inference_root(path)
    root = "" if any(name.startswith(root) for name in given) else root
    saved = SavedArrays(entries, [root + name for name in given])
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
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def restore_params(
    path: str | os.PathLike,
    abstract_params: Any,
    *,
    assignment: Assignment = (),
    strict: bool = True,
    verify: bool = True,
    use_ema: bool = False,
    added: Sequence[str] = (),
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
      verify: whether to check all files of the step and the restored arrays.
      use_ema: whether to read the moving average instead of the parameters.
      added: patterns of parameters that keep their initial values if the checkpoint lacks them, such as adapters.

    Raises:
      DamagedCheckpointError, CheckpointMismatchError, FileNotFoundError, BaseModelError.
      ValueError: an assignment pattern matches no parameter.
    """
    params = state_tree.flatten(abstract_params)

    def read(step: epath.Path) -> Any:
        which = "ema" if use_ema else "raw"
        parts = base_step.parts(step, step_dir.read_manifest(step), which)
        if not parts[0].entries:
            raise CheckpointMismatchError(
                f"checkpoint {step} holds no {parts[0].root.rstrip('/')}."
            )
        saved = {name: entry for part in parts for name, entry in part.entries.items()}
        sources = _assign(step, params, saved, assignment, strict, added)
        wanted = _wanted(step, params, saved, sources, added)
        arrays: state_tree.Flat = {}
        for part in parts:
            own = {part.root + name: x for name, x in wanted.items() if name in part.entries}
            if own:
                reads = (
                    read_verified(part.step, part.recorded, own)
                    if verify
                    else read_arrays(part.step, own)
                )
                arrays |= {name.removeprefix(part.root): array for name, array in reads.items()}
        flat = {}
        uses = collections.Counter(sources.values())
        for name, source in sources.items():
            if source is None:
                flat[name] = params[name]
                continue
            value = source.array(arrays).astype(params[name].dtype)
            if uses[source] > 1:  # A buffer can be donated only once.
                value = jnp.copy(value)
            flat[name] = jax.device_put(value, sharding_of(params[name]))
        return state_tree.unflatten(flat, abstract_params)

    return step_dir.newest_good(path, read)


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
