"""The parts of a sweep file: their keys and checks, and commands with names in braces, also as a shell reads them."""

import importlib
import inspect
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from espalier.common import spelling
from espalier.launch.config import moved

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PLACE = re.compile(rf"\{{({_NAME.pattern})\}}")
_OWN = ("MODEL_DIR", "SEED")  # bindings that the sweep sets itself
_PART = ("gin_files", "bindings", "memory_gb")
_KEYS = {
    "sweep": (*_PART, "seeds", "sizes", "arms", "evaluations"),
    "arm": (*_PART, "parent", "made", "seeds", "sizes", "evaluations"),
    "size": _PART,
    "evaluation": ("call", "arguments", "command"),
}
# Names in braces, in the command of a made arm, that are not arms.
_PLACES = ("run", "python", "SEED")


def command_line(words: Sequence[str]) -> str:
    """Returns words as a line for a shell; a word with single quotes is put into double quotes where these suffice."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)


def places(words: Iterable[str]) -> tuple[str, ...]:
    """Returns the names in braces in the words, each once, in order."""
    return tuple(dict.fromkeys(name for word in words for name in _PLACE.findall(word)))


def filled(words: Iterable[Any], values: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the words with names in braces replaced by their values; names without a value stay in braces."""
    return tuple(
        _PLACE.sub(lambda match: values.get(match[1], match[0]), str(word)) for word in words
    )


def values(arm: Mapping[str, Any], key: str) -> list[Any]:
    """Returns an arm's files or bindings, then those of its own at each size."""
    return [value for part in (arm, *at_sizes(arm).values()) for value in part.get(key) or ()]


def at_sizes(arm: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Returns what an arm has of its own at sizes, by size."""
    return sizes if isinstance(sizes := arm.get("sizes"), Mapping) else {}


def entry_problems(what: str, name: str, entry: Any, of: str = "") -> Iterator[str]:
    """Yields the problems of an arm or a size by itself; `of` is the arm that has the size."""
    where = f"{of}{what} {name!r}"
    if not _NAME.fullmatch(str(name)):
        yield f"{where}: names have letters, digits, '_' and '-' only."
    if not isinstance(entry, Mapping):
        yield f"{where} is {entry!r}, not a dict."
        return
    yield from unknown_keys(what, f"{where}: ", entry)
    yield from part_problems(where, entry)
    for size, own in at_sizes(entry).items():
        yield from entry_problems("size", size, own, of=f"{where}, ")
    command = entry.get("made")
    if command is not None and not (command and _strings(command)):
        yield f"{where}: made = {command!r} is not a tuple of strings, the words of a command."


def unknown_keys(what: str, where: str, entry: Mapping[str, Any]) -> Iterator[str]:
    for key in entry:
        if key not in _KEYS[what]:
            yield f"{where}a {what} has no {key!r}; {spelling.nearest(key, _KEYS[what])}"


def part_problems(where: str, part: Mapping[str, Any]) -> Iterator[str]:
    for key in ("gin_files", "bindings"):
        value = part.get(key) or ()
        if not _strings(value):
            yield f"{where}: {key} = {value!r} is not a tuple of strings."
            continue
        for entry in value if key == "bindings" else ():
            name, equals, _ = entry.partition("=")
            if not equals:
                yield f"{where}: the binding {entry!r} is not NAME=VALUE."
            if name.strip() in _OWN:
                yield f"{where}: the sweep itself sets {name.strip()}: remove the binding."
    memory = part.get("memory_gb")
    if memory is not None and (not isinstance(memory, int | float) or memory <= 0):
        yield f"{where}: memory_gb = {memory!r} is not a positive number of GB."


def seed_problems(where: str, part: Mapping[str, Any]) -> Iterator[str]:
    seeds = part.get("seeds") or ()
    if not isinstance(seeds, list | tuple) or not all(type(seed) is int for seed in seeds):
        yield f"{where}: seeds = {seeds!r} is not a tuple of integers."
    elif len(set(seeds)) < len(seeds):
        yield f"{where}: seeds = {tuple(seeds)} repeats a seed."


def made_problems(where: str, arm: Mapping[str, Any], arms: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems that only a made arm can have."""
    for key in ("parent", "gin_files", "bindings"):
        if values(arm, key):
            yield f"{where} is made, not trained: remove its {key}, or made."
    named = places(arm["made"])
    if "run" not in named:
        yield f"{where}: its command has no word with {{run}}, the run directory that it makes."
    names = (*arms, *_PLACES)
    for name in named:
        if name not in names:
            yield f"{where}: its command names {{{name}}}, but no arm has this name; {spelling.nearest(name, names)}"
    for name in _PLACES:
        if name in arms:
            yield f"arm {name!r}: {{{name}}} has another meaning in commands: rename the arm."


def binding_problems(where: str, arm: Mapping[str, Any], arms: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems that only a trained arm can have."""
    for name in places(values(arm, "bindings")):
        if name not in arms:
            yield f"{where}: a binding names {{{name}}}, but no arm has this name; {spelling.nearest(name, arms)}"


def evaluation_problems(evaluations: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in evaluations.items():
        where = f"evaluation {name!r}"
        if not isinstance(entry, Mapping) or ("call" in entry) == ("command" in entry):
            yield f"{where}: give either call = 'package.module:function' or command = (words)."
            continue
        yield from unknown_keys("evaluation", f"{where}: ", entry)
        if "command" in entry:
            command = entry["command"]
            if not isinstance(command, list | tuple) or "json" not in places(map(str, command)):
                yield f"{where}: its command has no word with {{json}}, where it writes its result."
            if "arguments" in entry:
                yield f"{where}: arguments are for a call; write them into the command."
            continue
        module, _, function = str(entry["call"]).partition(":")
        try:
            callable_ = getattr(importlib.import_module(moved.name_of_today(module)), function)
            inspect.signature(callable_).bind("run", **(entry.get("arguments") or {}))
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            yield f"{where}: {entry['call']!r} cannot be called with (run, arguments): {error}"


def _strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)


def listed(names: Any) -> str:
    return ", ".join(map(repr, names))
