"""Checkpoints of adapters alone: a step without the base model's parameters, which are read from the base's own step.

`espalier convert --to_adapter` writes one, and with `InitialCheckpoint.base_apart` every step of a run is one. Its record names
the base's step and the digest of the base's parameters, so that adapters are never combined with another base. Where the base
has moved, `base.json` in the adapters' run directory says where it is now. Which parameters a model has beside its base's, a
step's record says too (`Added`).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath

from espalier.trainers.checkpoints import state_tree, step_dir
from espalier.trainers.checkpoints.manifest import ArrayEntry, DamagedCheckpointError, Manifest

META = "base"  # key of a step's meta: {"path": step directory, "digest": of its parameters, "params": "raw" or "ema"}
ADDED = "added"  # key of a step's meta: see `Added`
FILE = "base.json"  # {"path": run or step directory}


@dataclasses.dataclass(frozen=True)
class Added:
    """The parameters that a model adds to its base's, by the beginning of the names of their modules.

    Without them, the model computes its base. The beginning is no regular expression, because records of strangers are read.
    """

    prefix: str

    def has(self, path: str) -> bool:
        """Returns whether the parameter at a path is one of them."""
        return any(name.startswith(self.prefix) for name in path.split("/")[:-1])

    def base_of(self, entries: Mapping[str, ArrayEntry]) -> dict[str, ArrayEntry]:
        """Returns the base's entries among those of a model."""
        return {name: entry for name, entry in entries.items() if not self.has(name)}


_BEFORE = "adapter_"  # steps that do not record it have adapters, or nothing added


def added(meta: Mapping[str, Any]) -> Added:
    """Returns what a step's facts say of its model's added parameters."""
    return Added(meta.get(ADDED, _BEFORE))


class BaseModelError(ValueError):
    """The base model of adapters is missing or another one."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A step that holds some of a model's parameters.

    Attributes:
      step: the step directory.
      recorded: its manifest.
      root: 'params/' or 'ema_params/'.
      entries: the parameters that are read from it, by path below the root.
    """

    step: epath.Path
    recorded: Manifest
    root: str
    entries: Mapping[str, ArrayEntry]


def parts(step: epath.Path, recorded: Manifest, params: str) -> list[Part]:
    """Returns the steps that a checkpoint's parameters are in: its own, and for a checkpoint of adapters also its base's.

    Args:
      step: the step directory.
      recorded: its manifest.
      params: 'raw', 'ema' or 'auto', see `Manifest.use_ema`.

    Raises:
      BaseModelError: the base's checkpoint is missing, or is of other parameters.
      DamagedCheckpointError.
    """
    root, own = recorded.params(params)
    parts = [Part(step, recorded, root, own)]
    meta = _facts(step, recorded, own) if own else {}
    if META in meta and all(map(added(meta).has, own)):
        parts.append(_base(step, meta[META]))
    return parts


def _facts(step: epath.Path, recorded: Manifest, own: Iterable[str]) -> Mapping[str, Any]:
    """Returns the facts of a step; none of a damaged record if the step has parameters of a base itself."""
    try:
        return step_dir.read_record(step, recorded)["meta"]
    except DamagedCheckpointError:
        if all(map(added({}).has, own)):
            raise
        return {}


def base_in(step: epath.Path, meta: Mapping[str, Any], run: epath.Path | None) -> Part | None:
    """Returns the base's parameters that a step's facts name; None if they name none. Raises the errors of `parts`.

    `run` is the directory of the step's run if the step is elsewhere.
    """
    return _base(step, meta[META], run) if META in meta else None


def named(base: Part) -> dict[str, str]:
    """Returns what a step's facts say of the base that it is without."""
    params = "ema" if base.root.startswith("ema") else "raw"
    return {"path": os.fspath(base.step), "params": params, "digest": digest(base.entries)}


def frozen(
    start: epath.Path, params: Any, mask: Any, added: Added, *, use_ema: bool
) -> dict[str, str]:
    """Returns what the facts of a run's steps say of its base, the checkpoint that it starts from.

    Args:
      start: the step directory that the run starts from.
      params: the model's parameters, arrays or jax.ShapeDtypeStruct.
      mask: tree of bools, True where trained; None when everything is.
      added: the model's parameters beside the base's.
      use_ema: whether the run starts from the moving average.

    Raises:
      BaseModelError: the run trains more or less than its adapters, or the base is not as it was saved.
    """
    flat = state_tree.flatten(params)
    trains = dict.fromkeys(flat, True) if mask is None else state_tree.flatten(mask)
    if wrong := [name for name in flat if trains[name] != added.has(name)]:
        kind = (
            "is no adapter, but trained"
            if trains[wrong[0]]
            else "is an adapter that is not trained"
        )
        raise BaseModelError(
            f"BASE_APART is for runs that train all adapters and nothing else: {wrong[0]} {kind}."
        )
    base = base_of(start, "ema" if use_ema else "raw")
    here = {
        name: str(ArrayEntry(tuple(leaf.shape), leaf.dtype.name, 0))
        for name, leaf in flat.items()
        if not added.has(name)
    }
    there = {
        name: str(widened(entry, flat[name]) if name in here else entry)
        for name, entry in base.entries.items()
    }
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise BaseModelError(
                f"BASE_APART needs the base model as it was saved, but {name} is {there.get(name, 'missing')} in {base.step} "
                f"and {here.get(name, 'missing')} here: set BASE_APART = False, or start from a model of this form."
            )
    return named(base)


def widened(entry: ArrayEntry, like: Any) -> ArrayEntry:
    """Returns an entry in the dtype of the model's array if that is a wider float: norms are float32 in every model."""
    floats = all(jnp.issubdtype(jnp.dtype(x.dtype), jnp.floating) for x in (entry, like))
    exact = floats and jnp.promote_types(entry.dtype, like.dtype) == like.dtype
    return dataclasses.replace(entry, dtype=jnp.dtype(like.dtype).name) if exact else entry


def without_base(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays of a state, by path, that a step with these facts holds."""
    if META not in meta:
        return dict(arrays)
    own = added(meta)
    return {
        name: array
        for name, array in arrays.items()
        if not name.startswith("params/") or own.has(name.removeprefix("params/"))
    }


def entries(step: epath.Path, recorded: Manifest, params: str) -> dict[str, ArrayEntry]:
    """Returns the entries of all of a checkpoint's parameters, by path; raises the errors of `parts`."""
    of_model = parts(step, recorded, params)
    return {name: entry for part in of_model for name, entry in part.entries.items()}


def base_of(step: epath.Path, params: str) -> Part:
    """Returns the parameters of a step's base model, in the step itself or in its base's."""
    of_step = parts(step, step_dir.read_manifest(step), params)
    return _without_added(of_step[-1])


def digest(base: Mapping[str, ArrayEntry]) -> str:
    """Returns the hash of names, shapes, dtypes and values of a base's parameters."""
    digests = {name: [str(x), f"{x.digest:016x}"] for name, x in base.items()}
    text = json.dumps(digests, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def present(params: Any, saved: Mapping[str, Any], added: Added) -> Any:
    """Returns a tree of parameters without added ones that are not in `saved`, entries by path.

    With such parameters, the model computes its base.
    """
    flat = state_tree.flatten(params)
    return state_tree.nest(
        {name: leaf for name, leaf in flat.items() if name in saved or not added.has(name)}
    )


def _without_added(part: Part) -> Part:
    meta = step_dir.read_record(part.step, part.recorded)["meta"] if part.entries else {}
    return dataclasses.replace(part, entries=added(meta).base_of(part.entries))


def _base(step: epath.Path, record: Mapping[str, Any], run: epath.Path | None = None) -> Part:
    file = (run or step_dir.folder_of(step)) / FILE
    moved = _path_in(file) if file.exists() else record["path"]
    try:
        path = step_dir.resolve(moved)
    except FileNotFoundError:
        raise BaseModelError(
            f"checkpoint {step} has only adapters, and their base model {moved} is missing: write the directory where it is "
            f'now into {os.fspath(file)}, as {{"path": "DIR"}}.'
        ) from None
    recorded = step_dir.read_manifest(path)
    root, own = recorded.params(record["params"])
    base = _without_added(Part(path, recorded, root, own))
    if digest(base.entries) != record["digest"]:
        raise BaseModelError(
            f"checkpoint {step} has adapters of another base model than {path}, whose parameters have another digest: write "
            f'the directory of their base into {os.fspath(file)}, as {{"path": "DIR"}}.'
        )
    return base


def _path_in(file: epath.Path) -> str:
    try:
        path = json.loads(file.read_text())["path"]
        if not isinstance(path, str) or not path.strip():
            raise TypeError
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise BaseModelError(
            f'{os.fspath(file)} does not say where the base model is: write {{"path": "DIR"}} into it, or delete it if the base '
            "is where it was."
        ) from None
    return path
