"""Checks a gin configuration against the code it names and finds every problem at once.

Gin itself stops at the first error, lets unused macros and bindings without effect pass, and
reports missing arguments only when a function is called, perhaps after hours of data work. This
pass reads the same statements in the same order, imports the same modules, and looks at the same
objects; it changes nothing in gin.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import gin

from launch import gin_reader, gin_types
from launch.gin_reader import Bound, Checked, Target, nearest
from launch.gin_source import Macro, Place, Problem


def check(
    files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    entry: Callable | None = None,
    entry_name: str = "",
    fragment: bool = False,
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
    """
    reader = gin_reader.Reader(search_paths)
    for path in files:
        reader.read_file(path, Place("--gin_file"), ())
    reader.read_bindings(bindings)
    checked = reader.checked
    if entry is not None:
        checked.targets.setdefault(entry_name, Target(entry_name, entry))
    _check_types(checked)
    if not fragment:
        _check_macros(checked)
        _check_scopes(checked)
        _check_arguments(checked, entry_name)
        if entry is not None:
            _check_effect(checked, entry_name)
    return checked


def _check_macros(checked: Checked) -> None:
    for name, place in checked.macros_read.items():
        if name not in checked.macros:
            near = nearest(difflib.get_close_matches(name, checked.macros))
            checked.problems.append(
                Problem(
                    place, f"macro '{name}' has no value", near or f"Set it: --gin.{name}=VALUE."
                )
            )
    known = sorted(checked.macros_read)
    for name, bound in checked.macros.items():
        if name not in checked.macros_read:
            near = nearest(difflib.get_close_matches(name, known))
            checked.problems.append(
                Problem(bound.place, f"nothing reads the macro '{name}'", near or "Remove it.")
            )
        elif isinstance(bound.value, Macro) and bound.value.required:
            checked.problems.append(
                Problem(bound.place, f"'{name}' is required", f"Set it: --gin.{name}=VALUE.")
            )
    for (scope, target, argument), bound in checked.bindings.items():
        if isinstance(bound.value, Macro) and bound.value.required:
            key = f"{scope}/{target}.{argument}" if scope else f"{target}.{argument}"
            checked.problems.append(
                Problem(bound.place, f"'{key}' is required", "Bind it in a later file.")
            )


def _check_scopes(checked: Checked) -> None:
    for (scope, _, _), bound in checked.bindings.items():
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


def _check_arguments(checked: Checked, entry_name: str) -> None:
    """Whatever is certain to be called by gin alone must have its arguments bound."""
    called: dict[str, Place] = {entry_name: Place("the entry point")} if entry_name else {}
    for bound in [*checked.bindings.values(), *checked.macros.values()]:
        for reference, target in bound.references:
            if reference.evaluate and target is not None:
                called.setdefault(target.name, bound.place)
    for name, place in called.items():
        given = {arg for (_, target, arg) in checked.bindings if target == name}
        missing = [p for p in required_parameters(checked.targets[name].value) if p not in given]
        if missing:
            short = ".".join(name.split(".")[-2:])
            example = f"Bind for example: {short}.{missing[0]} = ..."
            text = f"'{name}' is called without {', '.join(missing)}"
            checked.problems.append(Problem(place, text, example))


def _check_effect(checked: Checked, entry_name: str) -> None:
    """Bindings that the entry point cannot reach: an error on the command line, else a warning."""
    reached, read = reachable(checked, entry_name)
    for name, bound in checked.macros.items():
        if bound.place.line == 0 and name in checked.macros_read and name not in read:
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
    for (_, target, argument), bound in checked.bindings.items():
        if target not in reached:
            problem = Problem(
                bound.place,
                f"'{target}.{argument}' has no effect: no reference leads from '{entry_name}' to "
                f"'@{'.'.join(target.split('.')[-2:])}'",
            )
            (checked.problems if bound.place.line == 0 else checked.warnings).append(problem)


def reachable(checked: Checked, entry_name: str) -> tuple[set[str], set[str]]:
    """Names of the targets and macros that references lead to from the entry point."""
    reached: set[str] = set()
    read: set[str] = set()
    waiting = [entry_name]

    def follow(bound: Bound) -> None:
        waiting.extend(target.name for _, target in bound.references if target is not None)
        for macro in bound.macros:
            if macro.name not in read:
                read.add(macro.name)
                if macro.name in checked.macros:
                    follow(checked.macros[macro.name])

    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        # One object may be reached under two names, and a class brings its methods.
        here = checked.targets[name].value
        for other, target in checked.targets.items():
            if target.value is here or (inspect.isclass(here) and other.startswith(name + ".")):
                waiting.append(other)
        for (_, target_name, _), bound in checked.bindings.items():
            if target_name == name:
                follow(bound)
    return reached, read


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
