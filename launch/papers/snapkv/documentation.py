"""Questions about documentation whose answers are sentences: real text, of the Python standard library.

A context is a list of functions and classes, each with the first paragraph of its docstring:

  os.path.commonpath: Given a sequence of path names, returns the longest common sub-path.

A question asks for one of them, and the answer is its paragraph, after its first words. Names differ in parts, so that other lines of
a context resemble the one in question.
"""

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from espalier.data.text.sources import environment

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
WORDS = (14, 60)  # of an answer
OPENING = (
    3  # of them, which a model is given: left alone, a small one says that "the documentation says"
)
DEPTHS = (0.2, 0.5, 0.8)  # of the lines in question


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a function or class does, by its documentation."""

    name: str
    text: str

    @property
    def line(self) -> str:
        return f"{self.name}: {self.text}"

    @property
    def asked(self) -> bool:
        """Whether its text has the length of an answer."""
        return WORDS[0] <= len(self.text.split()) <= WORDS[1]


@dataclasses.dataclass(frozen=True)
class Context:
    """A list of entries, and those in question.

    Attributes:
      text: all lines.
      asked: the entries in question, in the order of DEPTHS.
    """

    text: str
    asked: tuple[Entry, ...]

    @staticmethod
    def question(entry: Entry) -> str:
        return f"What does the documentation above say about {entry.name}?"

    @staticmethod
    def opening(entry: Entry) -> str:
        """Returns the beginning of the answer."""
        return f"{entry.name}: {' '.join(entry.text.split()[:OPENING])}"

    @staticmethod
    def answer(entry: Entry) -> str:
        """Returns the rest of the answer."""
        return " ".join(["", *entry.text.split()[OPENING:]])


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Returns all public functions and classes of the standard library that have a docstring of their own, by name."""
    env = environment.standard_library()
    found: dict[str, str] = {}
    for name, path in env.files("python", (".py",)):
        parts = pathlib.PurePath(name).with_suffix("").parts[1:]
        modules = [part for part in parts if part != "__init__"]
        if modules and not _SKIPPED & set(modules) and not any(m.startswith("_") for m in modules):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {name: text for name, text in _of(tree, ".".join(modules)) if text.isascii()}
    times: dict[str, int] = {}
    for text in found.values():
        times[text] = times.get(text, 0) + 1
    return tuple(Entry(name, text) for name, text in sorted(found.items()) if times[text] == 1)


def _of(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields (name, first paragraph of the docstring) of public functions and classes."""
    for one in node.body:
        known = isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if not known or one.name.startswith("_"):
            continue
        name = f"{prefix}.{one.name}"
        if paragraph := " ".join((ast.get_docstring(one) or "").split("\n\n")[0].split()):
            yield name, paragraph
        if isinstance(one, ast.ClassDef):
            yield from _of(one, name)


def context(
    rng: np.random.Generator, listed: Sequence[Entry], count: Callable[[str], int], tokens: int
) -> Context:
    """Returns a context of at most `tokens` tokens.

    Args:
      rng: chooses the entries, and which are in question.
      listed: entries to choose from.
      count: number of tokens of a text.
      tokens: the most there may be.
    """
    long = [entry for entry in listed if entry.asked]
    asked = [long[i] for i in rng.permutation(len(long))[: len(DEPTHS)]]
    budget = tokens - sum(count(f"{entry.line}\n") for entry in asked)
    others: list[Entry] = []
    for i in rng.permutation(len(listed)):
        if listed[i] in asked:
            continue
        used = count(f"{listed[i].line}\n")
        if used > budget:
            break
        others.append(listed[i])
        budget -= used
    lines = [entry.line for entry in others]
    for depth, entry in sorted(zip(DEPTHS, asked, strict=True), reverse=True):
        lines.insert(round(depth * len(others)), entry.line)
    return Context("\n".join(lines), tuple(asked))
