"""Checkpoints of adapters alone: a step without the base model's parameters, which are read from the base's own step.

Its record names the base's step and the digest of the base's parameters, so that adapters are never combined with another
base. Where the base has moved, `base.json` in the adapters' run directory says where it is now.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from model.adapters.adapter import is_adapter
from trainers.checkpoints import state_tree, step_dir
from trainers.checkpoints.manifest import ArrayEntry, Manifest

META = "base"  # key of a step's meta: {"path": step directory, "digest": of its parameters, "params": "raw" or "ema"}
FILE = "base.json"  # {"path": run or step directory}


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
    """Returns the steps that a checkpoint's parameters are in: its own, and for adapters alone their base's.

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
    if own and all(map(is_adapter, own)):
        record = step_dir.read_record(step, recorded)["meta"].get(META)
        parts += [] if record is None else [_base(step, record)]
    return parts


def entries(step: epath.Path, recorded: Manifest, params: str) -> dict[str, ArrayEntry]:
    """Returns the entries of all of a checkpoint's parameters, by path; raises the errors of `parts`."""
    of_model = parts(step, recorded, params)
    return {name: entry for part in of_model for name, entry in part.entries.items()}


def base_of(step: epath.Path, params: str) -> Part:
    """Returns the parameters of a step that are no adapters', in the step itself or in its base's."""
    of_step = parts(step, step_dir.read_manifest(step), params)
    last = of_step[-1]
    return dataclasses.replace(last, entries=_without_adapters(last.entries))


def digest(base: Mapping[str, ArrayEntry]) -> str:
    """Returns the hash of names, shapes, dtypes and values of a base's parameters."""
    digests = {name: [str(x), f"{x.digest:016x}"] for name, x in _without_adapters(base).items()}
    text = json.dumps(digests, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def present(params: Any, saved: Mapping[str, Any]) -> Any:
    """Returns a tree of parameters without adapters that are not in `saved`, entries by path.

    With such parameters, an adapted model computes its base.
    """
    flat = state_tree.flatten(params)
    return state_tree.nest(
        {name: leaf for name, leaf in flat.items() if name in saved or not is_adapter(name)}
    )


def _without_adapters(all_of_them: Mapping[str, ArrayEntry]) -> dict[str, ArrayEntry]:
    return {name: entry for name, entry in all_of_them.items() if not is_adapter(name)}


def _base(step: epath.Path, record: Mapping[str, Any]) -> Part:
    file = step_dir.folder_of(step) / FILE
    moved = json.loads(file.read_text())["path"] if file.exists() else record["path"]
    try:
        path = step_dir.resolve(moved)
    except FileNotFoundError:
        raise BaseModelError(
            f"checkpoint {step} has adapters alone, and their base model {moved} is missing: write the directory where it is "
            f'now into {os.fspath(file)}, as {{"path": "DIR"}}.'
        ) from None
    base = base_of(path, record["params"])
    if digest(base.entries) != record["digest"]:
        raise BaseModelError(
            f"checkpoint {step} has adapters of another base model than {path}, whose parameters have another digest: write "
            f'the directory of their base into {os.fspath(file)}, as {{"path": "DIR"}}.'
        )
    return base
