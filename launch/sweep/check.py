"""Checks the configurations of all runs of a sweep before the first run, and computes their digests."""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from espalier.launch.config import moved
from espalier.launch.sweep import parts
from espalier.launch.sweep.file import Run, SweepError
from espalier.launch.sweep.folder import Planned, SweepFolder

ENTRY = "espalier.launch.train:train"
_GIN_FILE = "--gin_file="
# Bindings of the paths of a run and its parent. The digest has the parent's digest instead.
_PLACES = ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH")


def bindings_of(
    run: Run,
    folder: SweepFolder,
    start: pathlib.Path | None = None,
    sources: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Returns all bindings of a trained run, including those that the sweep adds.

    Args:
      run: the run.
      folder: folder of the sweep.
      start: its parent's final checkpoint; None for a check.
      sources: directories of the runs in its bindings, by arm; a check leaves the names in braces.
    """
    added = [f"MODEL_DIR={str(folder.directory(run.name))!r}"]
    if run.parent is not None:
        added.append(f"INITIAL_CHECKPOINT_PATH={str(start or folder.directory(run.parent))!r}")
    return [*parts.filled(run.bindings, sources), *added]


def plan(where: str, runs: Sequence[Run], folder: SweepFolder) -> tuple[Planned, ...]:
    """Checks the configurations of runs and returns the plan; nothing is trained or written.

    Args:
      where: the sweep file, for errors.
      runs: the runs, each after the runs it depends on.
      folder: folder of the sweep.

    Raises:
      SweepError: with the problems of all configurations.
    """
    problems: list[str] = []
    planned: dict[str, Planned] = {}
    loaded: dict[str, _Loaded | None] = {}  # by arm and size: the checks do not depend on seeds
    for run in runs:
        if not run.made and run.kind not in loaded:
            loaded[run.kind] = _load(run, folder, problems)
        if any(name not in planned for name in run.above):
            continue  # the problem is already listed
        if run.made:
            try:
                planned[run.name] = Planned(
                    run=run,
                    digest=made_digest(run, planned),
                    evaluation_digests=_evaluation_digests(run),
                )
            except FileNotFoundError as error:
                problems.append(f"{run.kind}: its command: {error}.")
        elif (config := loaded[run.kind]) is not None:
            parent = None if run.parent is None else planned[run.parent]
            planned[run.name] = entry = _planned(run, config, planned)
            # The model of a made run is not known before it is made.
            if parent is not None and (theirs := loaded.get(parent.run.kind)):
                problems += _start_problems(entry, parent, config, theirs)
    if problems:
        raise SweepError(where, problems)
    return tuple(planned.values())


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """The configuration that the runs of one arm and size share.

    Attributes:
      config: all bindings by name.
      arguments: arguments of the entry function.
      params: shapes and dtypes of the model's parameters, by path.
    """

    config: Mapping[str, str]
    arguments: Mapping[str, Any]
    params: Mapping[str, Any]


def _load(run: Run, folder: SweepFolder, problems: list[str]) -> _Loaded | None:
    """Loads a run's configuration; returns None after adding its problems."""
    import flax.linen as nn

    from espalier.launch.config import gin_config
    from espalier.launch.config import text as config_text
    from espalier.trainers import initialise
    from espalier.trainers.checkpoints import state_tree

    try:
        config = gin_config.load(run.gin_files, bindings_of(run, folder), entry=ENTRY)
        arguments = config.arguments()  # makes the recipe, which checks its own settings
        recipe = arguments["recipe"]
        variables = initialise.abstract_variables(recipe.model, recipe.inputs_spec)
    except gin_config.ConfigError as error:
        problems += [f"{run.kind}: {problem}" for problem in error.problems]
        return None
    except (ValueError, TypeError) as error:
        problems.append(f"{run.kind}: {str(error).strip()}")
        return None
    params = state_tree.flatten(nn.meta.unbox(variables["params"]))
    return _Loaded(config_text.canonical(config.text), arguments, params)


def _evaluation_digests(run: Run) -> dict[str, str]:
    return {name: _digest(entry) for name, entry in run.evaluations.items()}


def _planned(run: Run, loaded: _Loaded, planned: Mapping[str, Planned]) -> Planned:
    recipe = loaded.arguments["recipe"]
    parent = None if run.parent is None else planned[run.parent]
    start = _start(loaded.arguments.get("initial"), parent)
    whole = parent is not None and start["initial_scope"] == "state"
    return Planned(
        run=run,
        digest=config_digest(loaded.config, run, planned),
        total_steps=loaded.arguments.get("total_steps"),
        first_step=parent.total_steps if parent is not None and whole else 0,
        tokens_per_step=recipe.batch_size * recipe.length,
        start=json.loads(json.dumps(start, default=repr)),  # a transform becomes its repr
        evaluation_digests=_evaluation_digests(run),
    )


def _start(initial: Any, parent: Planned | None) -> dict[str, Any]:
    """Returns the scope of an initial checkpoint, and its other settings that differ from their defaults."""
    if initial is None or not initial.path:
        return {}
    start = {
        f"initial_{field.name}": getattr(initial, field.name)
        for field in dataclasses.fields(initial)
        if field.name == "scope" or getattr(initial, field.name) != field.default
    }
    path = start.pop("initial_path")
    return {**start, **({} if parent is not None else {"initial_checkpoint_path": path})}


def made_digest(run: Run, planned: Mapping[str, Planned]) -> str:
    """Returns the SHA-256 of a command, the statements of its gin files, and the digests of the runs it is made of.

    Raises:
      FileNotFoundError: see `gin_statements`.
    """
    files = gin_statements(run.made)
    command = {"made": run.made, "of": _digests_of_named(run, planned)}
    return _digest({**command, **({"gin_files": files} if files else {})})


def gin_statements(command: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the statements, without comments, of the gin files in a command's --gin_file= flags, in order.

    Files in other arms' runs, with names in braces, are skipped: they are part of those runs' digests.

    Raises:
      FileNotFoundError: a file or an included file does not exist.
    """
    return [
        statement
        for word in command
        if word.startswith(_GIN_FILE) and not parts.places([word])
        for statement in _statements(word.removeprefix(_GIN_FILE), ())
    ]


def _statements(path: str, including: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yields a file's statements; an include is replaced by the statements of the included file."""
    from gin import config_parser

    from espalier.launch.config import gin_source

    file = gin_source.find(path, [])
    if file is None:
        raise FileNotFoundError(f"the gin file {path} does not exist")
    if file in including:
        return  # the command reports that it includes itself
    for statement in gin_source.parse(gin_source.read(file), path):
        if isinstance(statement, gin_source.Problem):
            yield ("problem", str(statement))
        elif isinstance(statement, config_parser.IncludeStatement):
            yield from _statements(statement.filename, (*including, file))
        else:
            *content, _ = statement  # the last field is the location
            yield (type(statement).__name__, *map(repr, content))


def config_digest(
    config: Mapping[str, str],
    run: Run,
    planned: Mapping[str, Planned],
    sources: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Returns the SHA-256 of a run's configuration, without its paths, and of the digests of the runs it refers to.

    Args:
      config: all bindings by name; the run's seed replaces the value of SEED.
      run: the run.
      planned: planned runs, including all that the run depends on.
      sources: see `bindings_of`.
    """
    parent = None if run.parent is None else planned[run.parent].digest
    places = _PLACES if parent is not None else _PLACES[:1]
    own = {key: value for key, value in config.items() if key not in places}
    for arm, place in sources.items():
        own = {key: value.replace(place, f"{{{arm}}}") for key, value in own.items()}
    own["SEED"] = repr(run.seed)
    own = {moved.as_before(key): value for key, value in own.items()}  # which are sorted
    named = {"of": _digests_of_named(run, planned)} if run.made_of else {}
    return _digest({"config": own, "parent": parent, **named})


def _digests_of_named(run: Run, planned: Mapping[str, Planned]) -> dict[str, str]:
    return {arm: planned[name].digest for arm, name in run.made_of.items()}


def _digest(value: Any) -> str:
    """Returns the SHA-256 of a value's JSON, in which modules have the names from before they moved."""
    text = moved.as_before(json.dumps(value, sort_keys=True, default=str))
    return hashlib.sha256(text.encode()).hexdigest()


def _shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in params.items()}


def _start_problems(entry: Planned, parent: Planned, mine: _Loaded, theirs: _Loaded) -> list[str]:
    """Returns the problems that a run would otherwise meet only after its parent's training."""
    kind, parent_kind = entry.run.kind, parent.run.kind
    problems = []
    # total_steps is None if it depends on the data.
    if (entry.total_steps or math.inf) <= (entry.first_step or 0):
        problems.append(
            f"{kind}: it continues {parent_kind}, which ends at step {entry.first_step}, and ends at "
            f"step {entry.total_steps} itself: raise its TRAIN_STEPS, which counts from the parent's "
            "start."
        )
    if entry.start.get("initial_assignment") or entry.start.get("initial_strict") is False:
        return problems  # settings that select parameters allow other shapes
    from espalier.trainers.checkpoints.initial import plan_transform
    from espalier.trainers.checkpoints.restore_params import is_added

    there, inputs = _shapes(theirs.params), mine.params
    initial = mine.arguments.get("initial")
    if initial is not None and (transform := initial.transform) is not None:
        try:
            _, inputs = plan_transform(transform, there, mine.params)
        except ValueError as error:
            return [*problems, f"{kind}: of its parent {parent_kind}: {error}"]
    here = _shapes(inputs)
    added = () if initial is None or initial.scope != "params" else initial.added
    different = [
        name
        for name in {**here, **there}
        if here.get(name) != there.get(name) and (name in there or not is_added(name, added))
    ]
    if different:
        name = different[0]
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        shown = [list(shapes[name]) if name in shapes else "missing" for shapes in (there, here)]
        problems.append(
            f"{kind}: its parent {parent_kind} has another model: {name} is "
            f"{shown[0]} in the parent and {shown[1]} here{more}. "
            "Give both the same model, or choose parameters with InitialCheckpoint.assignment."
        )
    return problems


def difference(
    planned: Planned, plan: Mapping[str, Planned], folder: SweepFolder, changed: Sequence[str]
) -> str:
    """Returns a text on the difference between a run that has begun and its present configuration."""
    from espalier.launch.config import gin_config
    from espalier.launch.config import text as config_text

    if list(changed) != ["training"]:
        return f"evaluation {', '.join(map(repr, changed))} has other settings"
    if planned.run.made:
        return "its command, a gin file in the command, or a run in the command has changed"
    old = pathlib.Path(folder.directory(planned.name)) / "config.gin"
    if old.exists():
        run = planned.run
        bindings = bindings_of(run, folder, sources=folder.sources(run, plan))
        config = gin_config.load(run.gin_files, bindings, entry=ENTRY)
        first = config_text.first_difference(old.read_text(encoding="utf-8"), config.text, _PLACES)
        if first is not None:
            return first
    return (
        "a run that it depends on has changed"
        if planned.run.above
        else "its configuration has changed"
    )
