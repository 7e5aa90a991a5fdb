"""Checks a gin configuration against the code it names and reports every problem at once.

Gin itself stops at the first error, accepts unused macros and bindings without effect, and reports missing
arguments only when a function is called, perhaps after hours of data work.
"""

import difflib
import functools
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from espalier.launch.config import gin_methods, gin_reader, gin_source
from espalier.launch.config.gin_hints import files_that_read
from espalier.launch.config.gin_reach import Reach
from espalier.launch.config.gin_reader import (
    Bound,
    Checked,
    Target,
    final_bound,
    is_required,
    mapped,
    nearest,
    parameter_names,
    required_parameters,
)
from espalier.launch.config.gin_source import Macro, Place, Problem, scoped
from espalier.launch.config.gin_values import mismatch


def check(
    files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    entry: Callable | None = None,
    entry_name: str = "",
    fragment: bool = False,
    defaults: Sequence[str] = (),
    part: bool = False,
    arguments: Sequence[str] | None = None,
) -> Checked:
    """Reads a configuration and returns it with its problems.

    Args:
      files: gin files in order; later ones win.
      bindings: 'NAME=VALUE' strings in gin syntax, read after the files.
      search_paths: more folders in which relative files are looked for.
      entry: the function to be called; with it, bindings that it cannot reach are problems.
      entry_name: its full name, such as 'launch.train.train'.
      fragment: the files are only a part of a configuration: macros may be unused, undefined or
        required, and scopes may be entered elsewhere.
      defaults: files read before `files`, whose bindings may be without effect.
      part: the configuration belongs to another entry point, and `entry` uses only a part of it; the rest
        may lack values.
      arguments: the arguments of `entry` that are used; the others may lack values. None for all.
    """
    reader = gin_reader.Reader(search_paths, gin_source.imported_modules(files, search_paths))
    checked = reader.checked
    for path in defaults:
        reader.read_file(path)
    default_files = {os.path.realpath(file) for file in checked.files}
    follow = entry is not None and not fragment
    if follow:
        checked.targets.setdefault(entry_name, Target(entry_name, entry))
    # Each file, with the reach of the configuration up to it.
    so_far: list[tuple[str, Callable[[], Reach]]] = []
    if follow and not part:

        def after_file(file: str) -> None:
            reach = functools.partial(Reach, checked.copy(), entry_name)
            so_far.append((file, functools.cache(reach)))

        reader.after_file = after_file
    for path in files:
        reader.read_file(path)
    if reader.refused:  # other problems would only follow from the missing model
        checked.problems[:] = [reader.refused]
        return checked
    reader.read_bindings(bindings)
    problems = checked.problems
    if endless := list(_endless_macros(checked)):  # others cannot be known
        problems += endless
        return checked
    problems += (wrong_types := list(mistyped(checked)))
    problems += (conflicts := gin_methods.conflicts(checked))
    if fragment:
        return checked
    reach = Reach(checked, entry_name) if follow else None
    used = reach if part else None
    if follow and arguments is not None:
        unread = [name for name in parameter_names(entry) or () if name not in arguments]
        used = Reach(checked, entry_name, unread)
    problems += _without_value(checked, used)
    problems += _unread_macros(checked, default_files, command_line_only=part)
    problems += _unused_scopes(checked, command_line_only=part)
    if reach is not None:
        problems += _missing_arguments(checked, reach, {problem.place for problem in wrong_types})
        problems += _passed_by_caller(checked, reach)
        if not part:
            if not conflicts:
                problems += gin_methods.without_effect(checked, reach, so_far)
            twice = len(set(checked.files)) < len(checked.files)
            problems += _unread_overrides(checked, reach)
            # Reading a file twice replaces later bindings by its own, probably by mistake.
            for problem in _unreachable(checked, reach, [] if twice else so_far, entry_name):
                if problem.place.line == 0:  # on the command line
                    problems.append(problem)
                elif not _is_of_run(problem.place):
                    checked.warnings.append(problem)
    return checked


def _without_value(checked: Checked, used: Reach | None) -> Iterator[Problem]:
    """Yields macros without a value and required values; with `used`, only macros that it reaches."""
    macros_read = checked.macros_read if used is None else used.macros
    for name, place in checked.macros_read.items():
        if name not in checked.macros and name in macros_read:
            near = nearest(difflib.get_close_matches(name, checked.macros))
            remedy = near or f"Set it: --gin.{name}=VALUE."
            yield Problem(place, f"macro '{name}' has no value", remedy)
    for name, bound in checked.macros.items():
        if is_required(bound.value) and name in macros_read:
            yield Problem(bound.place, f"'{name}' is required", f"Set it: --gin.{name}=VALUE.")
    for (scope, target, argument), bound in checked.bindings.items():
        if is_required(bound.value):
            key = scoped(scope, f"{target}.{argument}")
            yield Problem(bound.place, f"'{key}' is required", "Bind it in a later file.")


def _unread_macros(
    checked: Checked, default_files: Container[str], command_line_only: bool
) -> Iterator[Problem]:
    for name, bound in checked.macros.items():
        # A run's config.gin also has the macros of the run before it, and VOCABULARY where its data have one of their own.
        if bound.file in default_files or _is_of_run(bound.place):
            continue
        if name not in checked.macros_read and not (command_line_only and bound.place.line):
            near = nearest(difflib.get_close_matches(name, sorted(checked.macros_read)))
            remedy = files_that_read(name) or near or "Remove it."
            yield Problem(bound.place, f"nothing reads the macro '{name}'", remedy)


def _endless_macros(checked: Checked) -> Iterator[Problem]:
    """Yields macros whose values lead back to themselves."""

    for name, bound in checked.macros.items():
        reached = {macro.name for macro in bound.macros}
        while name not in reached:
            known = [checked.macros[other] for other in reached if other in checked.macros]
            more = {macro.name for inner in known for macro in inner.macros}
            if more <= reached:
                break
            reached |= more
        else:
            text = f"the value of the macro '{name}' leads back to the macro itself"
            yield Problem(bound.place, text, "Give it a value of its own.")


def _unused_scopes(checked: Checked, command_line_only: bool) -> Iterator[Problem]:
    for (scope, _, _), bound in checked.bindings.items():
        if command_line_only and bound.place.line:
            continue
        if scope and scope not in checked.scopes_used:
            near = nearest(difflib.get_close_matches(scope, sorted(checked.scopes_used)))
            yield Problem(
                bound.place,
                f"nothing is referenced in the scope '{scope}', so the binding has no effect",
                near or f"Scopes are entered by references such as @{scope}/name.",
            )


def mistyped(checked: Checked) -> Iterator[Problem]:
    """Yields values of a wrong type or outside of the range of their parameter."""
    for (_, target, argument), bound in checked.bindings.items():
        final = final_bound(bound, checked.macros)
        referenced = dict(final.references)
        value = _with_macros(final.value, checked.macros)
        if message := mismatch(checked.targets[target].value, argument, value, referenced):
            yield Problem(final.place, f"'{target}.{argument}' {message}")


def _missing_arguments(
    checked: Checked, reach: Reach, reported_places: Container[Place]
) -> Iterator[Problem]:
    """Yields calls by gin without a required argument in the scope of the call.

    Args:
      checked: the configuration.
      reach: what gin calls in it.
      reported_places: a call at one of these is a mistake itself, such as `@f()` where `@f` is meant.
    """
    reported = set()
    for name, ways in reach.ways.items():
        target = checked.targets[name].value
        for way in ways:
            key = (id(target), way.scope)
            if not way.evaluated or key in reported or way.place in reported_places:
                continue
            bound = {*reach.bound(name, way.scope), *way.passed}
            missing = [p for p in required_parameters(target) if p not in bound]
            if missing:
                reported.add(key)
                called = scoped(way.scope, ".".join(name.split(".")[-2:]))
                where = f" in the scope '{way.scope}'" if way.scope else ""
                text = f"'{name}' is called{where} without {', '.join(missing)}"
                example = f"Bind for example: {called}.{missing[0]} = ..."
                yield Problem(way.place, text, example)


def _passed_by_caller(checked: Checked, reach: Reach) -> Iterator[Problem]:
    """Yields bindings of arguments that the caller passes or copies itself: the caller wins over gin."""
    for (scope, target, argument), bound in checked.bindings.items():
        ways = reach.ways_in(target, scope)
        if not ways or not all(argument in (*way.passed, *way.copied) for way in ways):
            continue
        owners = ", ".join(sorted({repr(way.owner) for way in ways}))
        by, remedy = f"the value of {owners} is called with {argument}=", "Remove it."
        if not all(way.owner for way in ways):
            by = "the command passes it, from its flags"
        elif copying := [w.wrapper for w in ways if w.wrapper and argument not in w.passed]:
            holders: set[Any] = {one for wrapper in copying for one in wrapper.classes}
            names = [one for one in holders if argument in one.__dataclass_fields__]
            places = sorted(f"{one.__module__}.{one.__qualname__}.{argument}" for one in names)
            by = f"the value of {owners} gets it from the module that it replaces"
            remedy = f"Bind {' or '.join(places)}."
        text = f"'{target}.{argument}' has no effect: {by}"
        yield Problem(bound.place, text, remedy)


def _unread_overrides(checked: Checked, reach: Reach) -> Iterator[Problem]:
    """Yields macros on the command line whose value the entry point does not use."""
    for name, bound in checked.macros.items():
        if bound.place.line == 0 and name in checked.macros_read and name not in reach.macros:
            readers = sorted(
                f"{target}.{argument}"
                for (_, target, argument), reader in checked.bindings.items()
                if any(macro.name == name for macro in reader.macros)
            )
            used_by = (
                f"only {', '.join(readers)} reads it" if readers else "its readers are replaced"
            )
            text = f"'{name}' has no effect: {used_by}, which this run does not use"
            yield Problem(bound.place, text, "Remove it.")


def _unreachable(
    checked: Checked,
    reach: Reach,
    so_far: Sequence[tuple[str, Callable[[], Reach]]],
    entry_name: str,
) -> Iterator[Problem]:
    """Yields bindings that the entry point cannot reach.

    Exceptions are bindings whose reference a later file or the command line replaced, which is the purpose of
    later files, and the file of a method (t5x_configs/methods): it binds several layers, of which a model has
    only some.
    """
    for key, bound in checked.bindings.items():
        _, target, argument = key
        if target in reach.ways or gin_methods.is_method(bound.file):
            continue
        replaced = any(
            target in before().ways and before().checked.bindings.get(key) is bound
            for _, before in so_far
        )
        if not replaced:
            short = ".".join(target.split(".")[-2:])
            text = f"no reference leads from '{entry_name}' to '@{short}'"
            yield Problem(bound.place, f"'{target}.{argument}' has no effect: {text}")


def _is_of_run(place: Place) -> bool:
    """Returns whether a statement is in a run's config.gin, of which another command or kind of run uses a part."""
    return os.path.basename(place.source) == gin_source.RUN_CONFIG


def _with_macros(value: Any, macros: Mapping[str, Bound]) -> Any:
    """Returns a value with the final values of the macros in its containers."""

    def final(leaf: Any) -> Any:
        known = isinstance(leaf, Macro) and leaf.name in macros
        return _with_macros(macros[leaf.name].value, macros) if known else leaf

    return mapped(value, final)
