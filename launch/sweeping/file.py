"""A sweep file, read: arms x sizes x seeds as runs, each after the one whose checkpoint it starts from.

A sweep file is Python with a function `get_config()` (or `get_config(text)`, for `--sweep FILE.py:TEXT`)
that returns an ml_collections.ConfigDict:

    seeds        of all arms, such as (0, 1, 2); (0,) if left out
    gin_files    read first by all runs
    bindings     'NAME=VALUE' as after --gin. on the command line
    sizes        {name: {gin_files, bindings, memory_gb}}; may be left out
    arms         {name: {parent, gin_files, bindings, seeds, sizes, evaluations, memory_gb}}
    evaluations  {name: {call, arguments} or {command}}, after each run's training
    memory_gb    peak of a run, where it is known

A ConfigDict sorts its keys; `arms=ConfigDict({...}, sort_keys=False)` keeps the order of the file. Later
wins: the sweep's files, the arm's, the size's, then bindings in the same order. An arm with a
`parent` starts from that arm's final checkpoint, of the same seed and size; what it takes of it is said by
its bindings (initial_scope and others of launch/train.py).
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_OWN = ("MODEL_DIR", "SEED")  # which the sweep sets itself
_PARENT = "INITIAL_CHECKPOINT_PATH"
_PART = ("gin_files", "bindings", "memory_gb")
_KEYS = {
    "sweep": (*_PART, "seeds", "sizes", "arms", "evaluations"),
    "arm": (*_PART, "parent", "seeds", "sizes", "evaluations"),
    "size": _PART,
    "evaluation": ("call", "arguments", "command"),
}


class SweepError(ValueError):
    """Everything found wrong with a sweep, in one message."""

    def __init__(self, where: str, problems: Sequence[str]):
        self.problems = tuple(dict.fromkeys(problems))
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        numbered = [f"{i}. {problem}" for i, problem in enumerate(self.problems, 1)]
        super().__init__(f"{count} in {where}:\n\n" + "\n\n".join(numbered))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
      name: 'arm/seed0', or 'arm/size/seed0' in a sweep over sizes; its place in the folder.
      arm, size, seed: what it is of; size is None in a sweep without sizes.
      parent: name of the run whose final checkpoint it starts from.
      gin_files, bindings: of its configuration; the sweep sets MODEL_DIR and the parent's path.
      evaluations: what is measured afterwards, by name.
      memory_gb: its peak, if known.
    """

    name: str
    arm: str
    size: str | None
    seed: int
    parent: str | None
    gin_files: tuple[str, ...]
    bindings: tuple[str, ...]
    evaluations: Mapping[str, Mapping[str, Any]]
    memory_gb: float | None

    @property
    def kind(self) -> str:
        """What runs that differ in their seed alone have in common."""
        return self.arm if self.size is None else f"{self.arm}/{self.size}"


def read(path: str) -> tuple[Run, ...]:
    """The runs of a sweep file, each after its parent.

    Args:
      path: the file, or 'FILE.py:TEXT' for a function that takes a text.

    Raises:
      SweepError: with all that is wrong in the file.
    """
    file, _, text = path.partition(":")
    config = _load(file, text)
    reader = _Reader(config)
    problems = [*_repeated_keys(file), *reader.problems()]
    if problems:
        raise SweepError(path, problems)
    return reader.runs()


def _load(file: str, text: str) -> dict[str, Any]:
    import ml_collections

    found = os.path.abspath(os.path.expanduser(file))
    if not os.path.isfile(found):
        raise SweepError(file, [f"there is no such file ({found}): give --sweep FILE.py."])
    spec = importlib.util.spec_from_file_location(pathlib.Path(found).stem, found)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*([text] if text else []))
    except Exception as error:  # whatever the file's own code raises is a problem of the file
        said = f"{type(error).__name__}: {error}"
        raise SweepError(file, [f"get_config() could not be called: {said}"]) from error
    if not isinstance(config, ml_collections.ConfigDict):
        kind = type(config).__name__
        raise SweepError(
            file, [f"get_config() returned a {kind}, not an ml_collections.ConfigDict."]
        )
    return config.to_dict()


def _repeated_keys(file: str) -> Iterator[str]:
    """Names given twice in one dict, of which Python silently takes the last."""
    tree = ast.parse(pathlib.Path(os.path.expanduser(file)).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        seen = set()
        for key in node.keys if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant):
                if key.value in seen:
                    yield f"line {key.lineno} names {key.value!r} a second time: rename one of them."
                seen.add(key.value)


class _Reader:
    """The parts of a sweep's configuration, checked and multiplied out."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._arms: Mapping[str, Any] = config.get("arms") or {}
        self._sizes: Mapping[str, Any] = config.get("sizes") or {}
        self._evaluations: Mapping[str, Any] = config.get("evaluations") or {}

    def problems(self) -> list[str]:
        found = list(_unknown_keys("sweep", "", self._config))
        if not self._arms:
            found.append("there are no arms: give arms = {name: {...}}.")
        found += _part_problems("the sweep", self._config)
        found += _seed_problems("the sweep", self._config)
        for what, entries in (("size", self._sizes), ("arm", self._arms)):
            for name, entry in entries.items():
                where = f"{what} {name!r}"
                if not _NAME.fullmatch(str(name)):
                    found.append(f"{where}: names have letters, digits, '_' and '-' only.")
                if not isinstance(entry, Mapping):
                    found.append(f"{where} is {entry!r}, not a dict.")
                    continue
                found += _unknown_keys(what, f"{where}: ", entry)
                found += _part_problems(where, entry)
        if not found:
            for name in self._arms:
                found += self._arm_problems(name)
        found += _evaluation_problems(self._evaluations)
        return found

    def _arm_problems(self, name: str) -> Iterator[str]:
        arm, where = self._arms[name], f"arm {name!r}"
        yield from _seed_problems(where, arm)
        for key, known in (("sizes", self._sizes), ("evaluations", self._evaluations)):
            for entry in arm.get(key) or ():
                if entry not in known:
                    yield f"{where}: {key} names {entry!r}; {_nearest(entry, known)}"
        parent = arm.get("parent")
        if parent is None:
            return
        if parent not in self._arms:
            yield f"{where}: its parent {parent!r} is no arm; {_nearest(parent, self._arms)}"
            return
        if any(
            binding.partition("=")[0].strip() == _PARENT for binding in arm.get("bindings") or ()
        ):
            yield f"{where}: {_PARENT} is bound, but the parent {parent!r} sets it: leave out one."
        line = [name]
        while (
            above := self._arms.get(line[-1], {}).get("parent")
        ) is not None and above not in line:
            line.append(above)
        if above == name:
            yield f"{where} is its own ancestor ({' -> '.join([*line, name])}): break the circle."
        for key, mine, theirs in (
            ("seeds", self._seeds(name), self._seeds(parent)),
            ("sizes", self._sizes_of(name), self._sizes_of(parent)),
        ):
            if lacking := [entry for entry in mine if entry not in theirs]:
                yield f"{where}: its parent {parent!r} lacks the {key} {_listed(lacking)}."

    def _seeds(self, arm: str) -> tuple[int, ...]:
        return tuple(self._arms[arm].get("seeds") or self._config.get("seeds") or (0,))

    def _sizes_of(self, arm: str) -> tuple[str | None, ...]:
        return tuple(self._arms[arm].get("sizes") or self._sizes or (None,))

    def runs(self) -> tuple[Run, ...]:
        """All runs, parents first; all arms with the first seed, then all with the second."""
        order: list[str] = []

        def add(arm: str) -> None:
            parent = self._arms[arm].get("parent")
            if parent is not None:
                add(parent)
            if arm not in order:
                order.append(arm)

        for name in self._arms:
            add(name)
        seeds = dict.fromkeys(seed for arm in order for seed in self._seeds(arm))
        return tuple(
            self._run(arm, size, seed)
            for seed in seeds
            for arm in order
            for size in self._sizes_of(arm)
            if seed in self._seeds(arm)
        )

    def _run(self, name: str, size: str | None, seed: int) -> Run:
        arm = self._arms[name]
        parts = [self._config, arm, *([] if size is None else [self._sizes[size]])]
        chosen = arm.get("evaluations")
        memory = [part["memory_gb"] for part in parts if part.get("memory_gb") is not None]

        def named(arm_name: str) -> str:
            return "/".join([arm_name, *([size] if size else []), f"seed{seed}"])

        return Run(
            name=named(name),
            arm=name,
            size=size,
            seed=seed,
            parent=named(arm["parent"]) if arm.get("parent") else None,
            gin_files=tuple(file for part in parts for file in part.get("gin_files") or ()),
            bindings=(*(b for part in parts for b in part.get("bindings") or ()), f"SEED={seed}"),
            evaluations={
                key: value
                for key, value in self._evaluations.items()
                if chosen is None or key in chosen
            },
            memory_gb=float(memory[-1]) if memory else None,
        )


def _unknown_keys(what: str, where: str, entry: Mapping[str, Any]) -> Iterator[str]:
    for key in entry:
        if key not in _KEYS[what]:
            yield f"{where}a {what} has no {key!r}; {_nearest(key, _KEYS[what])}"


def _part_problems(where: str, part: Mapping[str, Any]) -> Iterator[str]:
    for key in ("gin_files", "bindings"):
        value = part.get(key) or ()
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            yield f"{where}: {key} = {value!r} is not a tuple of strings."
            continue
        for entry in value if key == "bindings" else ():
            name, equals, _ = entry.partition("=")
            if not equals:
                yield f"{where}: the binding {entry!r} is not NAME=VALUE."
            if name.strip() in _OWN:
                yield f"{where}: the sweep itself sets {name.strip()}: leave it out of bindings."
    memory = part.get("memory_gb")
    if memory is not None and (not isinstance(memory, int | float) or memory <= 0):
        yield f"{where}: memory_gb = {memory!r} is not a positive number of GB."


def _seed_problems(where: str, part: Mapping[str, Any]) -> Iterator[str]:
    seeds = part.get("seeds") or ()
    if not isinstance(seeds, list | tuple) or not all(type(seed) is int for seed in seeds):
        yield f"{where}: seeds = {seeds!r} is not a tuple of integers."
    elif len(set(seeds)) < len(seeds):
        yield f"{where}: seeds = {tuple(seeds)} names one twice."


def _evaluation_problems(evaluations: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in evaluations.items():
        where = f"evaluation {name!r}"
        if not isinstance(entry, Mapping) or ("call" in entry) == ("command" in entry):
            yield f"{where}: give either call = 'package.module:function' or command = (words)."
            continue
        yield from _unknown_keys("evaluation", f"{where}: ", entry)
        if "command" in entry:
            words = entry["command"]
            if not isinstance(words, list | tuple) or not any("{json}" in str(w) for w in words):
                yield f"{where}: its command has no word with {{json}}, where it writes its result."
            if "arguments" in entry:
                yield f"{where}: arguments are for a call; write them into the command."
            continue
        module, _, function = str(entry["call"]).partition(":")
        try:
            callable_ = getattr(importlib.import_module(module), function)
            inspect.signature(callable_).bind("run", **(entry.get("arguments") or {}))
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            yield f"{where}: {entry['call']!r} cannot be called with (run, arguments): {error}"


def _nearest(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f"nearest: {close[0]!r}." if close else f"there are {_listed(known) or 'none'}."


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
