"""Parses gin files statement by statement, and continues after an error, so that all errors are reported."""

import difflib
import functools
import io
import os
import pathlib
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gin import config_parser

from espalier.launch import environment
from espalier.launch.config import model_file, moved
from espalier.launch.config.values import Macro, Place, Problem, Reference

ROOT = environment.ROOT
DYNAMIC_REGISTRATION = "__gin__.dynamic_registration"
RUN_CONFIG = "config.gin"  # a run's whole configuration, in its directory
VOCABULARY_RECORD = "vocabulary.json"  # beside it; see launch/run/run_vocabulary.py
_OWN_VOCABULARY = """
from espalier.launch.run import run_vocabulary

VOCABULARY = @run_vocabulary.of()
run_vocabulary.of.path = {folder!r}
"""

# A line on which a statement can begin; parsing resumes on the next one after a syntax error.
_STATEMENT = re.compile(r"(from|import|include)\s|[A-Za-z_][\w./]*\s*[=:]")


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        return Reference(scoped_configurable_name, evaluate)

    def macro(self, macro_name):
        return Macro(macro_name)


class _Parser(config_parser.ConfigParser):
    """Gin's parser, for which a repeated key of a dict is an error: the value of the first would be lost."""

    _keys: Sequence[Any] = ()  # of the innermost dict so far

    def _maybe_parse_container(self):
        outer, self._keys = self._keys, ()
        try:
            return super()._maybe_parse_container()
        finally:
            self._keys = outer

    def _parse_dict_item(self):
        location = self._current_location()
        key, value = super()._parse_dict_item()
        if key in self._keys:
            self._raise_syntax_error(f"the key {key!r} is repeated", location)
        self._keys = (*self._keys, key)
        return key, value


def bound_module(statement: config_parser.ImportStatement) -> str:
    """Returns the module that the name bound by an import means."""
    plain = not statement.is_from and not statement.alias
    return statement.module.split(".")[0] if plain else statement.module


def parse_value(text: str) -> Any:
    """Returns the value written in gin syntax; raises SyntaxError for anything else."""
    statements = list(parse(f"value = {text}\n", ""))
    if len(statements) != 1 or not isinstance(statements[0], config_parser.BindingStatement):
        raise SyntaxError(f"{text!r} is not a gin value")
    return statements[0].value


def is_written_as_itself(value: Any) -> bool:
    """Returns whether a value's text is gin syntax for an equal value; not so for objects, infinity and NaN."""
    try:
        return bool(parse_value(repr(value)) == value)
    except SyntaxError:
        return False


@functools.lru_cache(maxsize=512)
def parse(text: str, name: str) -> tuple[Any, ...]:
    """Returns gin's statements, with a `Problem` instead of each statement that cannot be parsed.

    What imports a module by a former name imports it by its name of today.
    """
    return tuple(_parse(text, name))


def _parse(text: str, name: str) -> Iterator[Any]:
    lines = text.splitlines(keepends=True)
    first = 0  # Index of the line at which the parser (re)starts.
    while first < len(lines):
        num_parsed = first  # Lines before this one belong to statements already yielded.
        try:
            # Blank lines in front keep the line numbers right after a restart.
            file: Any = io.StringIO("\n" * first + "".join(lines[first:]))
            file.name = name  # gin reads it
            parser = _Parser(file, _Delegate())
            while (statement := parser.parse_statement()) is not None:
                is_import = isinstance(statement, config_parser.ImportStatement)
                yield moved.today(statement) if is_import else statement
                num_parsed = max(num_parsed, statement.location.line_num)
            return
        except (SyntaxError, tokenize.TokenError, RecursionError) as error:
            begin = _next_statement(lines, num_parsed)
            failed = _error_line(error, begin, len(lines))
            yield _syntax_problem(error, name, lines, begin, failed)
            # The line at which the parser failed may itself begin a valid statement.
            first = _next_statement(lines, max(failed, begin + 1))


def _next_statement(lines: Sequence[str], start: int) -> int:
    for index in range(start, len(lines)):
        if _STATEMENT.match(lines[index]):
            return index
    return len(lines)


def _error_line(error: Exception, begin: int, count: int) -> int:
    """Returns the index of the line with the error; for open brackets, of their statement's first line."""
    line = getattr(error, "lineno", None)
    return line - 1 if line and line <= count else min(begin, count - 1)


def _syntax_problem(error, name: str, lines: Sequence[str], begin: int, failed: int) -> Problem:
    if begin < failed and _STATEMENT.match(lines[failed]):
        message = f"is not finished where line {failed + 1} begins the next statement"
        return Problem(Place(name, begin + 1, lines[begin]), message, "Close the bracket or quote.")
    message = error.msg if isinstance(error, SyntaxError) else str(error.args[0])
    token = re.search(r"Failed to parse token '(.*)'", message)
    if token:
        message = f"{token[1]!r} is not a value"
    remedy = "Strings need quotes, names of functions and classes a leading @, macros a %."
    return Problem(
        Place(name, failed + 1, lines[failed]),
        f"cannot be parsed: {' '.join(message.split()).rstrip('.')}",
        "Remove or rename one of the two." if message.endswith("is repeated") else remedy,
    )


def search_locations(search_paths: Sequence[str]) -> list[str]:
    """Returns the folders searched for relative gin files: the working directory, `search_paths`, the root."""
    return list(dict.fromkeys(["", *search_paths, ROOT]))


def find(path: str, search_paths: Sequence[str]) -> str | None:
    """Returns the first existing file that `path` can mean, or None."""
    # An absolute path replaces the folder that it is joined to.
    places = (os.path.join(folder, path) for folder in search_locations(search_paths))
    return next(filter(os.path.isfile, places), None)


def read(path: str) -> str:
    """Returns the text of a gin file; of a model.json the equal gin text.

    The config.gin of a run says how its vocabulary was made, perhaps from files that have changed or are elsewhere. Where
    the run's directory has the vocabulary itself, the text ends with bindings that use it.

    Raises:
      OSError, UnicodeDecodeError, ModelFileError.
    """
    if model_file.is_model_file(path):
        return model_file.read(path).gin()
    text = pathlib.Path(path).read_text("utf-8")
    folder, name = os.path.split(path)
    if name == RUN_CONFIG and os.path.isfile(os.path.join(folder, VOCABULARY_RECORD)):
        text += _OWN_VOCABULARY.format(folder=folder or ".")
    return text


def imported_modules(files: Iterable[str], search_paths: Sequence[str]) -> set[str]:
    """Returns the modules that gin files and their includes import.

    A model.json, whose modules are not counted, and a file that is missing or cannot be read have none.
    """
    modules: set[str] = set()
    seen: set[str] = set()
    paths = list(files)
    while paths:
        path = paths.pop()
        source = find(path, search_paths)
        if source is None or source in seen or model_file.is_model_file(source):
            continue
        seen.add(source)
        try:
            text = read(source)
        except (OSError, UnicodeDecodeError):
            continue  # reported when the file itself is read
        for statement in parse(text, path):
            if isinstance(statement, config_parser.ImportStatement):
                modules.add(statement.module)
            elif isinstance(statement, config_parser.IncludeStatement):
                paths.append(statement.filename)
    return modules


def why_unreadable(error: OSError | ValueError) -> str:
    """Returns the reason why a file cannot be read."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start}: {error.reason})"
    return str(getattr(error, "strerror", None) or error)


def similar_files(path: str, search_paths: Sequence[str]) -> list[str]:
    """Returns gin files with a name close to `path` in its folder."""
    folder, name = os.path.split(path)
    places = [os.path.join(base, folder) for base in search_locations(search_paths)]
    files = {file for place in places if os.path.isdir(place) for file in os.listdir(place)}
    names = sorted(file for file in files if file.endswith(".gin"))
    return [os.path.join(folder, n) for n in difflib.get_close_matches(name, names)]


def modules_named(name: str) -> list[str]:
    """Returns the full names of the project's modules whose last part is `name`."""
    paths = (
        path.relative_to(ROOT).with_suffix("")
        for package in environment.EARLIER_PACKAGES
        for path in pathlib.Path(ROOT, package).rglob(f"{name}.py")
    )
    return sorted(".".join(("espalier", *path.parts)) for path in paths)
