"""A sweep of branches that are trained apart and merged, round after round, from a YAML file:

  espalier sweep --sweep launch/sweep/rounds.py:rounds.yaml --out runs/rounds --workers 2

  start: /tmp/espalier_seed          # run that all branches start from
  gin_files: [t5x_configs/models/tiny.gin, t5x_configs/data/bytes.gin, t5x_configs/runs/pretrain.gin]
  bindings: [BATCH_SIZE=16]
  branches:                          # bindings of each
    code: [MIXTURE_OR_TASK_NAME='python']
    pages: [MIXTURE_OR_TASK_NAME='markup']
  updates: 100                       # of each branch between two merges
  rounds: 3
  merge: {merge_method: linear}      # or ties, with its parameters; see docs/use/merging.md

The arm merged2 is the merge after the second round. Its parameters are also what the branches of the third begin with, computed as they
start, while each continues with its own moments, step and place in the data. So a schedule spans all rounds, if it is bound to
`updates` times `rounds`. A method with a base takes the merge before.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import ml_collections

from espalier.common import spelling
from espalier.launch.merge import config_file
from espalier.model.transforms.merge_methods import METHODS

_MERGE_FILE = "t5x_configs/methods/averaging/merge.gin"
_KEYS = {
    "start": str,
    "gin_files": list,
    "bindings": list,
    "branches": dict,
    "updates": int,
    "rounds": int,
    "merge": dict,
}


def get_config(path: str) -> ml_collections.ConfigDict:
    """Returns the sweep of a file.

    Raises:
      ValueError: the file is malformed; the message names the key.
    """
    settings = _read(path)
    branches, updates, merge = (settings[key] for key in ("branches", "updates", "merge"))
    arms: dict[str, dict[str, Any]] = {}
    before, last = settings["start"], dict[str, Any]()
    for number in range(1, settings["rounds"] + 1):
        for name, bindings in branches.items():
            arm: dict[str, Any] = {"gin_files": tuple(settings["gin_files"])}
            more = [*settings["bindings"], *bindings, f"TRAIN_STEPS={number * updates}"]
            if number == 1:
                more.append(f"INITIAL_CHECKPOINT_PATH={settings['start']!r}")
            else:
                arm["parent"] = _branch(name, number - 1)
                arm["gin_files"] += (_MERGE_FILE,)
                more += [f"MERGE={last!r}", "INITIAL_SCOPE='state'"]
            arms[_branch(name, number)] = {**arm, "bindings": tuple(more)}
        models = [{"model": f"{{{_branch(name, number)}}}"} for name in branches]
        last = _configuration(merge, models, before)
        words = ("{python}", "-m", "espalier.launch.merge", f"--config={json.dumps(last)}")
        arms[f"merged{number}"] = {"made": (*words, "--out={run}")}
        before = f"{{merged{number}}}"
    if len(arms) < settings["rounds"] * (len(branches) + 1):
        raise ValueError(
            f"{path}: names of branches with the number of a round are equal: rename one."
        )
    return ml_collections.ConfigDict(
        {"arms": ml_collections.ConfigDict(arms, sort_keys=False), "evaluations": {}}
    )


def _branch(name: str, number: int) -> str:
    return f"{name}{number}"


def _configuration(merge: Mapping[str, Any], models: list[Any], before: str) -> dict[str, Any]:
    """Returns the configuration of a merge of branches, with equal weights unless the file has others."""
    method = METHODS[merge["merge_method"]]
    base = {"base_model": before} if method.base == "needed" else {}
    given = merge.get("parameters", {})
    weight = {"weight": 1.0} if "weight" in method.parameters and "weight" not in given else {}
    shared = {**weight, **given}
    return {**merge, **base, "models": models, **({"parameters": shared} if shared else {})}


def _read(path: str) -> Mapping[str, Any]:
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}: give FILE.py:ROUNDS.yaml.")
    settings = config_file.content(path)
    settings = {"bindings": [], "merge": {"merge_method": "linear"}, **settings}
    for key in settings:
        if key not in _KEYS:
            raise ValueError(f"{path}: unknown key {key!r}; {spelling.nearest(str(key), _KEYS)}")
    for key, kind in _KEYS.items():
        value = settings.get(key)
        if type(value) is not kind or (kind is int and value < 1):
            raise ValueError(f"{path}: {key} is {value!r}, and must be a {kind.__name__}.")
    if len(settings["branches"]) < 2:
        raise ValueError(f"{path}: branches has {len(settings['branches'])}: give two or more.")
    merge = settings["merge"]
    if taken := [key for key in ("models", "base_model", "slices", "modules") if key in merge]:
        raise ValueError(f"{path}: merge.{taken[0]}: the branches are merged: remove it.")
    name, count = merge.get("merge_method"), len(settings["branches"])
    if name not in METHODS:
        raise ValueError(f"{path}: merge.merge_method must be one of {', '.join(METHODS)}.")
    if not METHODS[name].least <= count <= (METHODS[name].most or count):
        raise ValueError(f"{path}: {name} does not merge {count} branches: choose another method.")
    return settings
