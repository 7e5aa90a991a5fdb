"""The candidates of a weight search: merges by any method with weights, and numbers of a merge from any command."""

import collections
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common.storage import paths as storage_paths
from espalier.launch.merge import config_file, run, start
from espalier.launch.merge.output import Workers
from espalier.launch.merge.plan import Planner
from espalier.launch.merge.settings import MergeError
from espalier.launch.run import metric_rows
from espalier.model.transforms.merge_methods import METHODS

LINEAR = {"merge_method": "linear"}
_KEYS = ("merge_method", "base_model", "parameters", "dtype", "out_dtype")
_SHOWN = 5  # keys in a message


class Candidates:
    """Merges of runs that differ in the models' weights, as `espalier merge` makes them.

    A model that has all of the weight is itself, whatever the method; where weights are absolute, a model of weight 1.

    Args:
      file: of the configuration, for messages.
      content: the configuration of a merge without models.
      paths: of the models; one that is given twice has both weights.

    Attributes:
      absolute: whether a factor of all weights changes the merge, because it does not divide some tensors by the sum of weights.

    Raises:
      MergeError: a method without weights, or runs of several architectures.
    """

    def __init__(self, file: str, content: Mapping[str, Any], paths: Sequence[str]):
        self._content, self._file = content, file
        self._paths = [storage_paths.absolute(path) for path in paths]
        self._method = str(content.get("merge_method"))
        self._check()
        self.absolute = False
        everything = config_file.one(self.configuration([1.0] * len(paths)), name=file)
        self._models = start.opened(everything)
        jobs = [x.job for x in Planner(everything, self._models, seed=0).plan() if x.job]
        self.absolute = any(
            job.values.get(key) is False
            for job in jobs
            for key in ("normalize", "normalize_weights")
        )
        self._workers = Workers()

    def _check(self) -> None:
        for key in self._content:
            if key not in _KEYS:
                raise MergeError(
                    f"{self._file}: {key}: a search takes {', '.join(_KEYS)}; the models are those of --models."
                )
        parameters = METHODS[self._method].parameters if self._method in METHODS else {"weight": 0}
        searched = "t" if self._method == "slerp" else "weight"
        if searched not in parameters or self._method == "nearswap":
            names = [
                name for name, x in METHODS.items() if "weight" in x.parameters or name == "slerp"
            ]
            raise MergeError(
                f"{self._file}: {self._method} has no weights to search; these have: {', '.join(names)}."
            )
        given = self._content.get("parameters")
        if isinstance(given, Mapping) and searched in given:
            raise MergeError(f"{self._file}: parameters.{searched} is what is searched: remove it.")
        base = self._content.get("base_model")
        if base is not None and self._method == "slerp":
            raise MergeError(
                f"{self._file}: base_model: slerp is searched between --models: remove it."
            )
        if base is not None and storage_paths.absolute(str(base)) in self._paths:
            raise MergeError(
                f"{self._file}: base_model {base} is among --models: the base has no weight; leave it out of them."
            )

    def steps(self) -> dict[str, str]:
        """Returns the step of every model by its path, the base's too, with the digest of its parameters."""
        return {path: " ".join(map(str, x.fingerprint())) for path, x in self._models.items()}

    def _weights(self, weights: Sequence[float]) -> dict[str, float]:
        summed: dict[str, float] = collections.defaultdict(float)
        for path, weight in zip(self._paths, weights, strict=True):
            summed[path] += weight
        return {path: float(weight) for path, weight in summed.items() if weight}

    def _is_alone(self, summed: Mapping[str, float]) -> bool:
        """Returns whether the merge is one of the models."""
        return len(summed) == 1 and (not self.absolute or set(summed.values()) == {1.0})

    def configuration(self, weights: Sequence[float]) -> dict[str, Any]:
        """Returns the content of the merge's configuration."""
        summed = self._weights(weights)
        if self._is_alone(summed):
            dtypes = {key: x for key, x in self._content.items() if key in ("dtype", "out_dtype")}
            return {
                "merge_method": "passthrough",
                "models": [{"model": x} for x in summed],
                **dtypes,
            }
        if self._method != "slerp":
            models = [{"model": path, "parameters": {"weight": w}} for path, w in summed.items()]
            return {**self._content, "models": models}
        if len(summed) > 2:
            raise MergeError(
                f"{self._file}: slerp is between two models, and --models has {len(summed)}."
            )
        (first, _), (_, second) = summed.items()
        t = second / sum(summed.values())
        shared = {**self._content.get("parameters", {}), "t": t}
        models = [{"model": path} for path in summed]
        return {**self._content, "base_model": first, "models": models, "parameters": shared}

    def merged(self, weights: Sequence[float]) -> start.Merged:
        """Returns the merge in memory."""
        merge = config_file.one(self.configuration(weights), name=self._file)
        models = {path: self._models[path] for path in merge.models()}
        return start.Merged(merge, models, workers=self._workers)

    def on_disk(self, weights: Sequence[float], folder: str) -> str:
        """Returns a run with the merge, made in a folder; for one model alone, its own."""
        import yaml

        if self._is_alone(summed := self._weights(weights)):
            return next(iter(summed))
        file, out = os.path.join(folder, "merge.yml"), os.path.join(folder, "merged")
        text = yaml.safe_dump(self.configuration(weights), sort_keys=False)
        pathlib.Path(file).write_text(text, encoding="utf-8")
        run.merge_all(file, out)
        return out


class Measure:
    """Numbers of a run by domain, from JSON files that commands write: of a judge, a reward, or a suite.

    Args:
      commands: their words; {run} is the run, {json} the file, {python} this Python.
      keys: of the numbers in the files, by domain; of a number inside objects, their keys are before it, with / between. A
        number whose key begins with - is negated.

    Raises:
      MergeError: a command names no run or no file.
    """

    def __init__(self, commands: Sequence[str], keys: Mapping[str, str]):
        self.commands, self.keys = [shlex.split(command) for command in commands], keys
        for command, words in zip(commands, self.commands, strict=True):
            for place in ("{run}", "{json}"):
                if not any(place in word for word in words):
                    raise MergeError(f"--measure {command!r} has no {place}.")

    def __call__(self, run: str, folder: str) -> dict[str, tuple[float, float]]:
        """Returns the numbers of a run, each with 0 for its unknown standard error.

        Raises:
          MergeError: a command fails, or the files lack a number or have it twice.
        """
        files = [_measured(words, run, folder) for words in self.commands]
        numbers: dict[str, tuple[float, float]] = {}
        for name, key in self.keys.items():
            having = [file for file in files if key.removeprefix("-") in file]
            if len(having) != 1:
                shown = ", ".join([x for file in files for x in file][:_SHOWN]) or "none"
                problem = f"several files of --measure have it, with {shown}"
                if not having:
                    problem = f"the file of --measure has the numbers {shown}"
                raise MergeError(f"--scores {name}={key}: {problem}.")
            sign = -1.0 if key.startswith("-") else 1.0
            numbers[name] = (sign * having[0][key.removeprefix("-")] + 0.0, 0.0)
        return numbers


def _measured(words: Sequence[str], run: str, folder: str) -> dict[str, float]:
    """Returns the numbers in the file that a command writes, by their keys."""
    file = os.path.join(folder, "measure.json")
    pathlib.Path(file).unlink(missing_ok=True)
    for place, value in {"{run}": run, "{json}": file, "{python}": sys.executable}.items():
        words = [word.replace(place, value) for word in words]
    # What it prints is no part of the search's table: it goes to standard error.
    status = subprocess.run(words, check=False, stdout=2).returncode
    if status:
        raise MergeError(f"--measure ended with status {status}: {shlex.join(words)}")
    try:
        return dict(metric_rows.numbers(json.loads(pathlib.Path(file).read_bytes())))
    except (OSError, ValueError) as error:
        raise MergeError(f"--measure wrote no JSON ({error}): {shlex.join(words)}") from None
