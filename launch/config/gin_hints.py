"""Remedies of errors in bindings of the command line: how the value that was meant is written."""

import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from espalier.launch import environment
from espalier.launch.config.gin_reader import Bound
from espalier.launch.config.gin_source import Reference

_CONFIGS = pathlib.Path(environment.ROOT, "t5x_configs")
_SHOWN = 3  # files of a remedy
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+")


def without_commas(text: str) -> str | None:
    """Returns a number that is written with commas between its thousands without them; None for other texts."""
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else None


def of_text(name: str, text: str, old: Bound | None) -> str:
    """Returns how to write the value of `--gin.NAME=TEXT`, whose text is not in gin syntax.

    Args:
      name: the macro or binding.
      text: what the user has written.
      old: the definition that the files have for the macro, if any.
    """
    value = None if old is None else old.value
    if isinstance(value, Reference):
        return _of_reference(name, text, old)
    if not isinstance(value, str) and (number := without_commas(text)):
        return f"A number has no commas: --gin.{name}={number}"
    if value is None or isinstance(value, str):
        return f"A string needs quotes inside quotes: --gin.{name}='\"{text or '...'}\"'"
    return f"Write it as the value of the files: --gin.{name}={_quoted(value)}"


def _quoted(value: Any) -> str:
    """Returns a value as a shell passes it."""
    return repr(value) if isinstance(value, int | float) else f'"{value!r}"'


def _of_reference(name: str, text: str, old: Bound | None) -> str:
    """Returns how to write a reference: by the module of the present one, or by a file of that name."""
    assert old is not None
    reference = old.value
    word = text.removesuffix("()").rpartition(".")[2]
    target = dict(old.references).get(reference)
    module = sys.modules.get(getattr(getattr(target, "value", None), "__module__", ""))
    call = "()" if reference.evaluate else ""
    if module is not None and word.isidentifier() and callable(getattr(module, word, None)):
        prefix = reference.name.rpartition(".")[0]
        return f"Write --gin.{name}=@{prefix}.{word}{call}"
    if files := list(_files_named(word)):
        return f"It takes a reference, such as {reference!r}; did you mean --gin_file={files[0]}?"
    kind = "an object, @MODULE.NAME()" if call else "a function, @MODULE.NAME"
    return f"It takes a reference to {kind}, such as --gin.{name}={reference!r}"


def _files_named(word: str) -> Iterator[str]:
    for path in sorted(_CONFIGS.rglob("*.gin")):
        if path.stem == word:
            yield os.path.relpath(path, environment.ROOT)


def files_that_read(macro: str) -> str:
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
