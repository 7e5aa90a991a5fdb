"""MoV and MoLORA at small scale: runs the unfinished runs of the sweep, and reads their results."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.shared import sweeps

TITLE = "MoV and MoLORA, 2309.05444"
SEEDS = 5
PARTS = {"operations": "compositions of operations"}
_KEYS = ("run", "arm", "seed", "step", "tokens", "seconds", "evaluations", "digest")
_PARAMS = "params/"


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweep by part; `model_dir` is the parent of its folder, options are as of `sweeps.rows`."""
    files = {part: ("mov/sweep", seeds) for part in parts}
    return sweeps.parts(model_dir, files, completed, **options)


def completed(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what the page needs of a row of results.

    Adds 'parameters' and 'trained_parameters', None for rows that are no model, and 'trained_loss', the loss on held-out
    strings of the compositions that are trained.
    """
    losses = [values["loss"] for values in row["held_out"].values()]
    return {
        **{key: row.get(key) for key in _KEYS},
        **(_parameters(directory) if row["step"] else {}),
        "trained_loss": float(np.mean(losses)) if losses else None,
    }


def _parameters(directory: pathlib.Path) -> dict[str, int]:
    from model.adapters import adapter
    from trainers.checkpoints import step_dir

    arrays = step_dir.read_manifest(step_dir.resolve(directory)).arrays
    sizes = {
        name.removeprefix(_PARAMS): math.prod(entry.shape)
        for name, entry in arrays.items()
        if name.startswith(_PARAMS)
    }
    own = sum(size for name, size in sizes.items() if re.fullmatch(adapter.LEAVES, name))
    total = sum(sizes.values())
    return {"parameters": total - own, "trained_parameters": own or total}
