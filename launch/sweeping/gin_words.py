"""The gin files that a command's words name, by what they say: a change of one is a change of the command."""

from collections.abc import Iterable, Iterator

from gin import config_parser

from launch.config import gin_source
from launch.config.gin_source import Problem
from launch.sweeping import words

_FLAG = "--gin_file="


def said(command: Iterable[str]) -> list[tuple[str, ...]]:
    """The statements of the files that --gin_file= names, in their order, without comments.

    Files of other arms, with names in braces, are left to the digests of those.

    Raises:
      FileNotFoundError: there is no such file, or none that it includes.
    """
    found: list[tuple[str, ...]] = []
    for word in command:
        if word.startswith(_FLAG) and not words.places([word]):
            found += _statements(word.removeprefix(_FLAG), ())
    return found


def _statements(path: str, including: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """A file's statements, and in the place of what it includes that file's."""
    file = gin_source.find(path, [])
    if file is None:
        raise FileNotFoundError(f"there is no gin file {path}")
    if file in including:
        return  # the command says that it includes itself
    for statement in gin_source.parse(gin_source.read(file), path):
        if isinstance(statement, Problem):
            yield ("problem", str(statement))
        elif isinstance(statement, config_parser.IncludeStatement):
            yield from _statements(statement.filename, (*including, file))
        else:
            *parts, _ = statement  # where it stands
            yield (type(statement).__name__, *map(repr, parts))
