"""Reads a sweep file: arms x sizes x seeds, as a list of runs in which each run follows the runs it starts from.

A sweep file is Python with a function `get_config()` (or `get_config(text)`, for `--sweep FILE.py:TEXT`)
that returns an ml_collections.ConfigDict:

    seeds        of all arms, such as (0, 1, 2); (0,) by default
    gin_files    read first by all runs
    bindings     'NAME=VALUE' as after --gin. on the command line
    sizes        {name: {gin_files, bindings, memory_gb}}; optional
    arms         {name: {parent, gin_files, bindings, seeds, sizes, evaluations, memory_gb}}, or
                 {name: {made, seeds, sizes, evaluations, memory_gb}}
    evaluations  {name: {call, arguments} or {command}}, after each run's training
    memory_gb    peak memory of a run, if known

An arm's `sizes` are those of the sweep's at which it runs, ("64", "128"), or what it has of its own at each of these, {"64":
{"bindings": ("LEARNING_RATE=1e-3",)}, "128": {}}.

A ConfigDict sorts its keys; `arms=ConfigDict({...}, sort_keys=False)` keeps the order of the file. Later
wins: the sweep's files, the arm's, the size's, the arm's own at the size, then bindings in the same order. An arm with a
`parent` starts from that arm's final checkpoint, of the same seed and size; its bindings (INITIAL_SCOPE and others, see
trainers/checkpoints/initial.py) choose what it takes from it. An arm that is `made` is not trained: a command makes its run
directory from other arms' runs. In the command's words {arm} is the run directory of the arm of that name, of the same
seed and size, {run} the directory to be made, {SEED} the seed and {python} this Python. The sweep's evaluations apply to
trained arms; a made arm names its own.

{arm} is that directory in an arm's own bindings too, for files that another arm made:
"PAIRS='{pairs}/pairs.jsonl'".
"""

import ast
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.common import spelling
from espalier.launch.config import setting_flags
from espalier.launch.sweep import parts

_PARENT = "INITIAL_CHECKPOINT_PATH"


class SweepError(ValueError):
    """All problems of a sweep in one message."""

    def __init__(self, where: str, problems: Sequence[str]):
        self.problems = tuple(dict.fromkeys(problems))
        count = len(self.problems)
        numbered = [f"{i}. {problem}" for i, problem in enumerate(self.problems, 1)]
        title = f"{count} problem{'s' * (count > 1)} in {where}:"
        super().__init__("\n\n".join([title, *numbered]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run, trained or made.

    Attributes:
      name: 'arm/seed0', or 'arm/size/seed0' in a sweep over sizes; its place in the folder.
      arm, size, seed: its position in the sweep; size is None in a sweep without sizes.
      parent: name of the run whose final checkpoint it starts from.
      gin_files, bindings: its configuration; the sweep adds MODEL_DIR and the parent's path.
      evaluations: settings of the evaluations after training, by name.
      memory_gb: its peak memory, if known.
      made: words of the command that makes it, with the seed filled in; empty for a trained run.
      made_of: names of the runs, by arm, that these words (or the bindings of a trained run) refer to.
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
    made: tuple[str, ...] = ()
    made_of: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The arm and size; runs that differ only in their seed have the same kind."""
        return self.arm if self.size is None else f"{self.arm}/{self.size}"

    @property
    def above(self) -> tuple[str, ...]:
        """Names of the runs that must finish first: its parent, or the runs it is made of."""
        parent = () if self.parent is None else (self.parent,)
        return tuple(dict.fromkeys((*parent, *self.made_of.values())))


def read(path: str) -> tuple[Run, ...]:
    """Returns the runs of a sweep file, each after the runs that must finish before it.

    Args:
      path: the file, or 'FILE.py:TEXT' for a function that takes a text.

    Raises:
      SweepError: with all problems of the file.
    """
    file, _, text = path.partition(":")
    config = _load(file, text)
    reader = _Reader(config)
    problems = [*_repeated_keys(file), *reader.problems()]
    if problems:
        raise SweepError(path, problems)
    return reader.runs()


def _load(file: str, text: str) -> dict[str, Any]:
    full = os.path.abspath(os.path.expanduser(file))
    if not os.path.isfile(full):
        raise SweepError(file, [f"the file {full} does not exist: give --sweep FILE.py."])
    try:
        return setting_flags.python_config(full, text).to_dict()
    except setting_flags.PythonConfigError as error:
        raise SweepError(file, [str(error)]) from error


def _repeated_keys(file: str) -> Iterator[str]:
    """Yields keys that occur twice in a dict; Python would silently use the last value."""
    tree = ast.parse(pathlib.Path(os.path.expanduser(file)).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        seen = set()
        for key in node.keys if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant):
                if key.value in seen:
                    yield f"line {key.lineno} repeats the key {key.value!r}: rename one of them."
                seen.add(key.value)


class _Reader:
    """Checks the parts of a sweep's configuration, and makes the runs of all arms, sizes and seeds."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._arms: Mapping[str, Any] = config.get("arms") or {}
        self._sizes: Mapping[str, Any] = config.get("sizes") or {}
        self._evaluations: Mapping[str, Any] = config.get("evaluations") or {}

    def problems(self) -> list[str]:
        problems = list(parts.unknown_keys("sweep", "", self._config))
        if not self._arms:
            problems.append("there are no arms: give arms = {name: {...}}.")
        problems += parts.part_problems("the sweep", self._config)
        problems += parts.seed_problems("the sweep", self._config)
        for what, entries in (("size", self._sizes), ("arm", self._arms)):
            for name, entry in entries.items():
                problems += parts.entry_problems(what, name, entry)
        if not problems:
            for name in self._arms:
                problems += self._arm_problems(name)
        problems += parts.evaluation_problems(self._evaluations)
        return problems

    def _arm_problems(self, name: str) -> Iterator[str]:
        arm, where = self._arms[name], f"arm {name!r}"
        yield from parts.seed_problems(where, arm)
        for key, names in (("sizes", self._sizes), ("evaluations", self._evaluations)):
            for entry in arm.get(key) or ():
                if entry not in names:
                    yield f"{where}: {key} names {entry!r}; {spelling.nearest(entry, names)}"
        if arm.get("made"):
            yield from parts.made_problems(where, arm, self._arms)
        else:
            yield from parts.binding_problems(where, arm, self._arms)
            yield from self._parent_problems(where, arm)
        if circle := self._circle(name):
            yield f"{where} is its own ancestor ({' -> '.join(circle)}): break the circle."
        for above in self._above(name):
            if above == arm.get("parent"):
                what = f"its parent {above!r}"
            else:
                what = f"the arm {above!r} in its {'command' if arm.get('made') else 'bindings'}"
            for key, mine, theirs in (
                ("seeds", self._seeds(name), self._seeds(above)),
                ("sizes", self._sizes_of(name), self._sizes_of(above)),
            ):
                if lacking := [entry for entry in mine if entry not in theirs]:
                    yield f"{where}: {what} lacks the {key} {parts.listed(lacking)}."

    def _parent_problems(self, where: str, arm: Mapping[str, Any]) -> Iterator[str]:
        parent = arm.get("parent")
        if parent is None:
            return
        if parent not in self._arms:
            yield f"{where}: its parent {parent!r} does not exist; {spelling.nearest(parent, self._arms)}"
        elif any(
            binding.partition("=")[0].strip() == _PARENT
            for binding in parts.values(arm, "bindings")
        ):
            yield f"{where}: {_PARENT} is bound, but the parent {parent!r} sets it: remove one of them."

    def _above(self, name: str) -> tuple[str, ...]:
        """Returns the arms that an arm starts from or is made of."""
        parent = self._arms[name].get("parent")
        parents = [parent] if parent in self._arms else []
        return tuple(dict.fromkeys((*parents, *self._named(name))))

    def _named(self, name: str) -> tuple[str, ...]:
        """Returns the arms named in braces in an arm's command or bindings."""
        arm = self._arms[name]
        named = parts.places(arm.get("made") or parts.values(arm, "bindings"))
        return tuple(other for other in named if other in self._arms)

    def _circle(self, name: str) -> list[str]:
        """Returns the shortest cycle of arms from an arm through those it depends on; empty if there is none."""
        lines, seen = [[name]], {name}
        for line in lines:  # the loop appends to `lines`
            for above in self._above(line[-1]):
                if above == name:
                    return [*line, name]
                if above not in seen:
                    seen.add(above)
                    lines.append([*line, above])
        return []

    def _seeds(self, arm: str) -> tuple[int, ...]:
        return tuple(self._arms[arm].get("seeds") or self._config.get("seeds") or (0,))

    def _sizes_of(self, arm: str) -> tuple[str | None, ...]:
        return tuple(self._arms[arm].get("sizes") or self._sizes or (None,))

    def runs(self) -> tuple[Run, ...]:
        """Returns all runs, each after the runs it depends on: all arms with the first seed, then with the second."""
        order: list[str] = []

        def add(arm: str) -> None:
            if arm not in order:
                for above in self._above(arm):
                    add(above)
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
        command = arm.get("made") or ()
        levels = [self._config, arm]
        if size is not None:
            levels += [self._sizes[size], parts.at_sizes(arm).get(size, {})]
        memory = [level["memory_gb"] for level in levels if level.get("memory_gb") is not None]
        trained = [] if command else levels
        bindings = [binding for level in trained for binding in level.get("bindings") or ()]
        chosen = arm.get("evaluations")
        if chosen is None:
            chosen = () if command else self._evaluations

        def named(arm_name: str) -> str:
            return "/".join([arm_name, *([size] if size else []), f"seed{seed}"])

        return Run(
            name=named(name),
            arm=name,
            size=size,
            seed=seed,
            parent=named(arm["parent"]) if arm.get("parent") else None,
            gin_files=tuple(file for level in trained for file in level.get("gin_files") or ()),
            bindings=() if command else (*bindings, f"SEED={seed}"),
            evaluations={k: v for k, v in self._evaluations.items() if k in chosen},
            memory_gb=float(memory[-1]) if memory else None,
            made=parts.filled(command, {"SEED": str(seed)}),
            made_of={other: named(other) for other in self._named(name)},
        )
