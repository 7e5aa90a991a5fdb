"""Loads gin files and command-line bindings, and checks them against the code that they name: all problems in one error, before any work.

Gin itself stops at the first error, accepts unused macros and bindings without effect, and reports missing
arguments only when a function is called, perhaps after hours of data work.
Nothing of this project is decorated with gin, and gin's own state is not used. Files begin with `from __gin__ import dynamic_registration`,
import modules and bind plain functions and classes. See docs/reference/configuration.md.
"""

import dataclasses
import functools
import importlib
import os
import pathlib
import re
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from espalier.launch import environment
from espalier.launch.config import gin_reach, gin_source
from espalier.launch.config.build import Configuration
from espalier.launch.config.gin_reach import Reach
from espalier.launch.config.gin_reader import (
    Bound,
    Checked,
    Reader,
    final_bound,
    is_required,
    nearest,
)
from espalier.launch.config.parameters import mismatch, parameter_names, required_parameters
from espalier.launch.config.values import Macro, Place, Problem, Reference, mapped, scoped

# An unquoted value that is read as a string: a path or a name.
_BARE_STRING = re.compile(r"[A-Za-z_/.~][\w./~:+-]*")
# Literals of other languages, and the equivalent gin literals.
_WORDS = {
    **dict.fromkeys(("true", "yes", "on"), "True"),
    **dict.fromkeys(("false", "no", "off"), "False"),
    **dict.fromkeys(("none", "null"), "None"),
    **dict.fromkeys(("nan", "inf"), None),
}
_CONFIGS = pathlib.Path(environment.ROOT, "t5x_configs")
_SHOWN = 3  # files of a remedy
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+")


class ConfigError(ValueError):
    """All problems of a configuration, in one message."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        numbered = [f"{i}. {problem}" for i, problem in enumerate(problems, 1)]
        super().__init__(f"{count} in the gin configuration:\n\n" + "\n\n".join(numbered) + "\n")


def load(
    files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    entry: Callable | str | None = None,
    **how: Any,
) -> Configuration:
    """Returns a configuration that was checked completely.

    Args:
      files, bindings, search_paths, entry, how: see `check`.

    Raises:
      ConfigError: with all problems.
    """
    checked = check(files, bindings, search_paths, entry, **how)
    if checked.problems:
        raise ConfigError(checked.problems)
    # Macros without a value after the checks are not used; the text of the configuration says so.
    without = [n for n in (*checked.macros, *checked.macros_read) if _is_open(n, checked)]
    nothing = dict.fromkeys(without, Bound(None, Place("without a value")))
    tree = dataclasses.replace(checked, macros={**checked.macros, **nothing})
    configuration = Configuration(tree, _entry(entry)[1])
    try:
        configuration.give_to_gin()
    except ValueError as error:  # gin's message names the argument
        raise ConfigError([Problem(Place("gin"), str(error))]) from error
    return configuration


def check(
    files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    entry: Callable | str | None = None,
    *,
    unused: Mapping[str, str] | None = None,
    defaults: Sequence[str] = (),
    fragment: bool = False,
    part: bool = False,
    arguments: Sequence[str] | None = None,
    imports_of: Sequence[str] = (),
) -> Checked:
    """Reads a configuration and returns it with its problems.

    Args:
      files: gin files, absolute or relative to the working directory, to a search path or to the
        root of the repository; later ones win.
      bindings: 'NAME=VALUE' as after --gin. on the command line, read after the files. A path or
        name without quotes is read as a string, unless a number or other literal is expected.
      search_paths: more folders to look in.
      entry: the entry function of this configuration, or its name 'package.module:name'. With it,
        unbound arguments and bindings that cannot reach it are problems too.
      unused: macros whose values do not matter, with the value in gin syntax to use if none is set.
      defaults: gin files read before `files` that the user did not name, such as the model of a checkpoint's run.
        Their bindings may be without effect.
      fragment: the files are only a part of a configuration: macros may be unused, undefined or
        required, and scopes may be entered elsewhere.
      part: the configuration belongs to another entry point, and `entry` uses only a part of it. The
        rest may lack values, and bindings without effect are allowed.
      arguments: the arguments of `entry` that the caller uses; the others may lack values. None for all.
      imports_of: gin files of which only the imports count: a model.json may use their modules.
    """
    function, entry_name = _entry(None if fragment else entry)
    own = gin_source.imported_modules([*files, *imports_of], search_paths)
    reader = Reader(search_paths, own)
    checked, problems = reader.checked, reader.checked.problems
    for path in defaults:
        reader.read_file(path)
    default_files = {os.path.realpath(file) for file in checked.files}
    # Each file, with the reach of the configuration up to it.
    so_far: list[tuple[str, Callable[[], Reach]]] = []
    if function is not None and not part:

        def after_file(file: str) -> None:
            reach = functools.partial(Reach, checked.copy(), entry_name)
            so_far.append((file, functools.cache(reach)))

        reader.after_file = after_file
    for path in files:
        reader.read_file(path)
    normal, malformed = _normal(bindings, unused or {}, checked)
    if reader.refused:  # other problems would only follow from the missing model
        problems[:] = [reader.refused, *malformed]
        return checked
    reader.read_bindings(normal)
    if function is not None:
        checked.target(entry_name, function)
    if endless := list(_endless_macros(checked)):  # others cannot be known
        problems += [*endless, *malformed]
        return checked
    problems += (wrong_types := list(mistyped(checked)))
    problems += (conflicts := gin_reach.conflicts(checked))
    problems += gin_reach.set_too_early(checked)
    if fragment:
        problems += malformed
        return checked
    reach = None if function is None else Reach(checked, entry_name)
    used = reach if part else None
    if function is not None and arguments is not None:
        unread = [name for name in parameter_names(function) or () if name not in arguments]
        used = Reach(checked, entry_name, unread)
    problems += _without_value(checked, used)
    problems += _unread_macros(checked, default_files, command_line_only=part)
    problems += _unused_scopes(checked, command_line_only=part)
    if reach is not None:
        problems += _missing_arguments(checked, reach, {problem.place for problem in wrong_types})
        problems += _passed_by_caller(checked, reach)
        if not part:
            if not conflicts:
                problems += gin_reach.without_effect(checked, reach, so_far)
            twice = len(set(checked.files)) < len(checked.files)
            problems += _unread_overrides(checked, reach)
            problems += _of_run_elsewhere(checked, reach)
            # Reading a file twice replaces later bindings by its own, probably by mistake.
            for problem in _unreachable(checked, reach, [] if twice else so_far, entry_name):
                if problem.place.line == 0:  # on the command line
                    problems.append(problem)
                elif not _is_of_run(problem.place):
                    checked.warnings.append(problem)
    problems += malformed
    return checked


def _is_open(name: str, checked: Checked) -> bool:
    return name not in checked.macros or is_required(checked.macros[name].value)


def _entry(entry: Callable | str | None) -> tuple[Callable | None, str]:
    if entry is None:
        return None, ""
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        return getattr(importlib.import_module(module), attribute), f"{module}.{attribute}"
    return entry, f"{entry.__module__}.{entry.__qualname__}"


def _without_value(checked: Checked, used: Reach | None) -> Iterator[Problem]:
    """Yields macros without a value and required values; with `used`, only macros that it reaches."""
    macros_read = checked.macros_read if used is None else used.macros
    for name, place in checked.macros_read.items():
        if name not in checked.macros and name in macros_read:
            near = nearest(name, checked.macros)
            remedy = near or f"Set it: --gin.{name}=VALUE."
            if name == "TASKS":  # references to functions, which a file of data sets
                known = "VOCABULARY" in checked.macros
                remedy = (
                    "There are no data of its own here: give a file of data, such as --gin_file=t5x_configs/data/"
                    f"{'files_base' if known else 'files'}.gin with FILES, and MIXTURE_OR_TASK_NAME=files."
                )
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
            near = nearest(name, sorted(checked.macros_read))
            remedy = _files_that_read(name) or near or "Remove it."
            yield Problem(bound.place, f"nothing reads the macro '{name}'", remedy)


def _endless_macros(checked: Checked) -> Iterator[Problem]:
    """Yields macros whose values lead back to themselves."""
    for name, bound in checked.macros.items():
        reached = set(bound.macros)
        while name not in reached:
            known = [checked.macros[other] for other in reached if other in checked.macros]
            more = {macro for inner in known for macro in inner.macros}
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
            near = nearest(scope, sorted(checked.scopes_used))
            yield Problem(
                bound.place,
                f"nothing is referenced in the scope '{scope}', so the binding has no effect",
                near or f"Scopes are entered by references such as @{scope}/name.",
            )


def mistyped(checked: Checked) -> Iterator[Problem]:
    """Yields values of a wrong type or outside of the range of their parameter."""
    for (_, target, argument), bound in checked.bindings.items():
        final = final_bound(bound, checked.macros)
        value = _with_macros(final.value, checked.macros)
        if message := mismatch(checked.targets[target].value, argument, value):
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
    for name, ways in reach.ways.items():
        target = checked.targets[name].value
        reported: set[str] = set()  # scopes
        for way in ways:
            if not way.evaluated or way.scope in reported or way.place in reported_places:
                continue
            bound = {*reach.bound(way), *way.passed}
            missing = [p for p in required_parameters(target) if p not in bound]
            if missing:
                reported.add(way.scope)
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
                if name in reader.macros
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
    later files, streams of a shipped file of data that an evaluation does not read, and the file of a method
    (t5x_configs/methods): it binds several layers, of which a model has
    only some.
    """
    for key, bound in checked.bindings.items():
        _, target, argument = key
        if target in reach.ways or gin_reach.is_method(bound.file):
            continue
        if gin_reach.unread_stream(bound.file, target, entry_name, reach.ways):
            continue
        replaced = any(
            target in before().ways and before().checked.bindings.get(key) is bound
            for _, before in so_far
        )
        if not replaced:
            short = ".".join(target.split(".")[-2:])
            text = f"no reference leads from '{entry_name}' to '@{short}'"
            yield Problem(bound.place, f"'{target}.{argument}' has no effect: {text}")


def _of_run_elsewhere(checked: Checked, reach: Reach) -> Iterator[Problem]:
    """Yields a MODEL_DIR of a run's config.gin that leads to another folder than the run's: a new run would start there."""
    bound = checked.macros.get("MODEL_DIR")
    if bound is None or "MODEL_DIR" not in reach.macros or not _is_of_run(bound.place):
        return
    value, folder = bound.value, os.path.dirname(bound.place.source) or "."
    if not isinstance(value, str) or "://" in value:
        return
    if not os.path.isfile(os.path.join(folder, "run.json")):
        return  # a file of this name that no run has written
    path = os.path.realpath(os.path.expanduser(value))
    if path != os.path.realpath(folder):
        yield Problem(
            bound.place,
            f"the file is of the run in {folder}, but MODEL_DIR = {value!r} means {path} here",
            f"Give MODEL_DIR: --gin.MODEL_DIR={folder} continues the run, another folder begins a new one.",
        )


def _is_of_run(place: Place) -> bool:
    """Returns whether a statement is in a run's config.gin, of which another command or kind of run uses a part."""
    return os.path.basename(place.source) == gin_source.RUN_CONFIG


def _with_macros(value: Any, macros: Mapping[str, Bound]) -> Any:
    """Returns a value with the final values of the macros in its containers."""

    def final(leaf: Any) -> Any:
        known = isinstance(leaf, Macro) and leaf.name in macros
        return _with_macros(macros[leaf.name].value, macros) if known else leaf

    return mapped(value, final)


def _normal(
    bindings: Sequence[str], unused: Mapping[str, str], files: Checked
) -> tuple[list[str], list[Problem]]:
    """Returns bindings in gin syntax, `unused` macros included, and the problems of those that have none.

    Whether a bare word is a string depends on the values in the files.
    """
    set_here = {binding.partition("=")[0].strip() for binding in bindings}
    placeholders = [
        f"{name}={value}"
        for name, value in unused.items()
        if name not in set_here and name in files.macros_read and _is_open(name, files)
    ]
    malformed: list[Problem] = []
    normal = []
    for binding in [*bindings, *placeholders]:
        try:
            normal.append(_normalise(binding, files.macros))
        except ValueError as error:
            malformed.append(Problem(Place(f"--gin.{binding}"), str(error)))
    return normal, malformed


def _normalise(binding: str, macros: Mapping[str, Bound]) -> str:
    """Returns the binding in gin syntax, with quotes around a bare path or name."""
    name, equals, text = binding.partition("=")
    name, text = name.strip(), text.strip()
    if not equals or not name:
        raise ValueError("expected NAME=VALUE")
    old = final_bound(macros[name], macros).value if name in macros else None
    try:
        gin_source.parse_value(text)
        # 10,100 is also a tuple in gin syntax.
        if isinstance(old, list | tuple) or not _THOUSANDS.fullmatch(text):
            return f"{name}={text}"
    except SyntaxError:
        pass
    if is_required(old):
        old = None
    takes_string = old is None or isinstance(old, str)
    if text.lower() in _WORDS or not takes_string or not _BARE_STRING.fullmatch(text):
        instead = f" (it was {old!r})" if not takes_string else ""
        meant = _WORDS.get(text.lower())
        hint = f" Did you mean {meant}?" if meant else ""
        remedy = _how_to_write(name, text, old)
        raise ValueError(f"{text!r} is not a value in gin syntax{instead}.{hint} {remedy}")
    return f"{name}={os.path.expanduser(text)!r}"


def _how_to_write(name: str, text: str, old: Any) -> str:
    """Returns how to write the value of `--gin.NAME=TEXT`, whose text is not in gin syntax.

    Args:
      name: the macro or binding.
      text: what the user has written.
      old: the value that the files have for the macro, if any.
    """
    if isinstance(old, Reference):
        return _how_to_refer(name, text, old)
    if not isinstance(old, str) and _THOUSANDS.fullmatch(text):
        return f"A number has no commas: --gin.{name}={text.replace(',', '')}"
    if old is None or isinstance(old, str):
        return f"A string needs quotes inside quotes: --gin.{name}='\"{text or '...'}\"'"
    shown = repr(old) if isinstance(old, int | float) else f'"{old!r}"'  # as a shell passes it
    return f"Write it as the value of the files: --gin.{name}={shown}"


def _how_to_refer(name: str, text: str, old: Reference) -> str:
    """Returns how to write a reference: by the module of the present one, or by a file of that name."""
    word = text.removesuffix("()").rpartition(".")[2]
    module = sys.modules.get(getattr(getattr(old.target, "value", None), "__module__", ""))
    call = "()" if old.evaluate else ""
    if module is not None and word.isidentifier() and callable(getattr(module, word, None)):
        return f"Write --gin.{name}=@{old.name.rpartition('.')[0]}.{word}{call}"
    for path in sorted(_CONFIGS.rglob("*.gin")):
        if path.stem == word:
            file = os.path.relpath(path, environment.ROOT)
            return f"It takes a reference, such as {old!r}; did you mean --gin_file={file}?"
    kind = "an object, @MODULE.NAME()" if call else "a function, @MODULE.NAME"
    return f"It takes a reference to {kind}, such as --gin.{name}={old!r}"


def _files_that_read(macro: str) -> str:
    """Returns a remedy for a macro that nothing reads: the shipped files that define and read it; '' if there is none."""
    pattern = re.compile(rf"^{re.escape(macro)} *=", re.MULTILINE)
    files = [
        os.path.relpath(path, environment.ROOT)
        for path in sorted(_CONFIGS.rglob("*.gin"))
        if "experiments" not in path.parts and pattern.search(path.read_text("utf-8"))
    ]
    if not files:
        return ""
    more = f" or {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return f"It is a macro of {' or '.join(files[:_SHOWN])}{more}: add that with --gin_file, or remove the macro."
