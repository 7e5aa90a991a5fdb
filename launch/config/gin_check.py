"""Checks a gin configuration against the code it names and finds every problem at once.

Gin itself stops at the first error, lets unused macros and bindings without effect pass, and
reports missing arguments only when a function is called, perhaps after hours of data work. This
pass reads the same statements in the same order, imports the same modules, and looks at the same
objects; it changes nothing in gin.
"""

import difflib
import inspect
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import gin

from launch.config import gin_reader, gin_types
from launch.config.gin_reach import Reach
from launch.config.gin_reader import Bound, Checked, Target, is_required, nearest
from launch.config.gin_source import Macro, Place, Problem


def check(
    files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    entry: Callable | None = None,
    entry_name: str = "",
    fragment: bool = False,
    untrusted: Sequence[str] = (),
    part: bool = False,
) -> Checked:
    """Reads everything and returns it with the problems found.

    Args:
      files: gin files in order; later ones win.
      bindings: 'NAME=VALUE' strings in gin syntax, read after the files.
      search_paths: more folders in which relative files are looked for.
      entry: the function to be called; bindings it cannot reach are found then.
      entry_name: its full name, such as 'launch.train.train'.
      fragment: the files are only a part of a configuration, so that macros may be unused,
        undefined or still required, and scopes be entered elsewhere.
      untrusted: files read before the others, which may name only what is harmless.
      part: the configuration is another entry point's, of which this one uses a part; the rest may
        be left open.
    """
    reader = gin_reader.Reader(search_paths)
    for path in untrusted:
        reader.read_untrusted(path, files)
    if reader.refused:  # whatever else is wrong would follow from it
        reader.checked.problems[:] = reader.refused
        return reader.checked
    checked = reader.checked
    follow = entry is not None and not fragment
    if follow:
        checked.targets.setdefault(entry_name, Target(entry_name, entry))
    so_far: list[Reach] = []  # what each file reached with those before it
    if follow and not part:
        reader.after_file = lambda: so_far.append(Reach(checked.copy(), entry_name))
    for path in files:
        reader.read_file(path, Place("--gin_file"), ())
    if len(set(checked.files)) < len(checked.files):
        so_far = []  # what a file replaces that is read again was hardly meant to be
    reader.read_bindings(bindings)
    _check_types(checked)
    if fragment:
        return checked
    reach = Reach(checked, entry_name) if follow else None
    used = reach if part else None
    _check_values(checked, used)
    _check_readers(checked, command_line_only=part)
    _check_scopes(checked, command_line_only=part)
    if reach is not None:
        _check_arguments(checked, reach)
        _check_passed(checked, reach)
        if not part:
            _check_effect(checked, reach, so_far, entry_name)
    return checked


def _check_values(checked: Checked, used: Reach | None) -> None:
    """Macros need a value, and so does what is required; given `used`, only what is reached there."""
    for name, place in checked.macros_read.items():
        if name not in checked.macros and (used is None or name in used.macros):
            near = nearest(difflib.get_close_matches(name, checked.macros))
            checked.problems.append(
                Problem(
                    place, f"macro '{name}' has no value", near or f"Set it: --gin.{name}=VALUE."
                )
            )
    for name, bound in checked.macros.items():
        if is_required(bound.value) and name in (
            checked.macros_read if used is None else used.macros
        ):
            checked.problems.append(
                Problem(bound.place, f"'{name}' is required", f"Set it: --gin.{name}=VALUE.")
            )
    for (scope, target, argument), bound in checked.bindings.items():
        if is_required(bound.value):
            key = f"{scope}/{target}.{argument}" if scope else f"{target}.{argument}"
            checked.problems.append(
                Problem(bound.place, f"'{key}' is required", "Bind it in a later file.")
            )


def _check_readers(checked: Checked, command_line_only: bool) -> None:
    known = sorted(checked.macros_read)
    for name, bound in checked.macros.items():
        if name not in checked.macros_read and not (command_line_only and bound.place.line):
            near = nearest(difflib.get_close_matches(name, known))
            checked.problems.append(
                Problem(bound.place, f"nothing reads the macro '{name}'", near or "Remove it.")
            )


def _check_scopes(checked: Checked, command_line_only: bool) -> None:
    for (scope, _, _), bound in checked.bindings.items():
        if command_line_only and bound.place.line:
            continue
        if scope and scope not in checked.scopes_used:
            near = nearest(difflib.get_close_matches(scope, sorted(checked.scopes_used)))
            checked.problems.append(
                Problem(
                    bound.place,
                    f"nothing is referenced in the scope '{scope}', so the binding has no effect",
                    near or f"Scopes are entered by references such as @{scope}/name.",
                )
            )


def _check_types(checked: Checked) -> None:
    for (_, target, argument), bound in checked.bindings.items():
        value, place = bound.value, bound.place
        for _ in range(len(checked.macros)):  # At most; a macro may stand for another.
            if isinstance(value, Macro) and value.name in checked.macros:
                place = checked.macros[value.name].place
                value = checked.macros[value.name].value
        message = gin_types.mismatch(checked.targets[target].value, argument, value)
        if message:
            checked.problems.append(Problem(place, f"'{target}.{argument}' {message}"))


def _check_arguments(checked: Checked, reach: Reach) -> None:
    """Whatever is called by gin alone must have its arguments bound, in the scope of the call."""
    told = set()
    for name, ways in reach.ways.items():
        for way in ways:
            if not way.evaluated:
                continue
            given = {*reach.bound(name, way.scope), *way.passed}
            needed = required_parameters(checked.targets[name].value)
            missing = [parameter for parameter in needed if parameter not in given]
            key = (id(checked.targets[name].value), way.scope)
            if missing and key not in told:
                told.add(key)
                short = ".".join(name.split(".")[-2:])
                called = f"{way.scope}/{short}" if way.scope else short
                where = f" in the scope '{way.scope}'" if way.scope else ""
                text = f"'{name}' is called{where} without {', '.join(missing)}"
                example = f"Bind for example: {called}.{missing[0]} = ..."
                checked.problems.append(Problem(way.place, text, example))


def _check_passed(checked: Checked, reach: Reach) -> None:
    """Bindings of arguments that the caller passes, which wins over gin."""
    for (scope, target, argument), bound in checked.bindings.items():
        ways = reach.ways_in(target, scope)
        if ways and all(argument in way.passed for way in ways):
            owners = sorted({way.owner for way in ways})
            by = (
                f"what is bound to {', '.join(map(repr, owners))} is called with {argument}="
                if all(owners)
                else "the command passes it, from its flags"
            )
            checked.problems.append(
                Problem(bound.place, f"'{target}.{argument}' has no effect: {by}", "Leave it out.")
            )


def _check_effect(checked: Checked, reach: Reach, so_far: Sequence[Reach], entry_name: str) -> None:
    """Bindings that the entry point cannot reach: an error on the command line, else a warning.

    None is due where a later file, or the command line, has put something else in the place of what was reached:
    that is what it was given for. The file of a method (t5x_configs/methods) binds all layers that it knows, of
    which a model has some.
    """
    for name, bound in checked.macros.items():
        if bound.place.line == 0 and name in checked.macros_read and name not in reach.macros:
            readers = sorted(
                f"{target}.{argument}"
                for (_, target, argument), other in checked.bindings.items()
                if any(macro.name == name for macro in other.macros)
            )
            used_by = (
                f"only {', '.join(readers)} reads it" if readers else "its readers are replaced"
            )
            text = f"'{name}' has no effect: {used_by}, which this run does not use"
            checked.problems.append(Problem(bound.place, text, "Leave it out."))
    for key, bound in checked.bindings.items():
        _, target, argument = key
        of_method = "methods" in pathlib.PurePath(bound.place.source).parts
        replaced = any(
            target in before.ways and before.checked.bindings.get(key) is bound for before in so_far
        )
        if target not in reach.ways and not (of_method or replaced):
            problem = Problem(
                bound.place,
                f"'{target}.{argument}' has no effect: no reference leads from '{entry_name}' to "
                f"'@{'.'.join(target.split('.')[-2:])}'",
            )
            (checked.problems if bound.place.line == 0 else checked.warnings).append(problem)


def final_value(value: Any, macros: dict[str, Bound], depth: int = 20) -> Any:
    """`value` with top-level macros replaced by what they stand for."""
    while isinstance(value, Macro) and value.name in macros and depth:
        value, depth = macros[value.name].value, depth - 1
    return value


def required_parameters(target: Any) -> list[str]:
    """Parameters without a default."""
    if target in (gin.config.macro, gin.config.singleton):
        return []
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
