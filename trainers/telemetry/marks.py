"""Marks of a file that only grows: its length and checksum at some moments, to verify it when a run goes on.

Each checkpoint holds the marks up to its step. Whatever the file has after the last mark was written later.
Here are also the kinds of numbers in files that Python reads back: JSON's have any number of digits.
"""

import dataclasses
import itertools
import os
import shutil
import sys
import zlib
from collections.abc import Sequence
from typing import Any

from espalier.common import files

# More marks are thinned to every other one: the older the rows, the more of them one damage loses.
_MOST = 64


def is_count(value: Any) -> bool:
    """Returns whether a JSON value is a whole number from 0 on that a float holds exactly."""
    return type(value) is int and 0 <= value < 2**53


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a number (NaN and infinities included) that a float holds."""
    if isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


@dataclasses.dataclass(frozen=True)
class Mark:
    """A state of the file.

    Attributes:
      step: step of its last row.
      size: length in bytes.
      crc: CRC-32 of all of them.
    """

    step: int = 0
    size: int = 0
    crc: int = 0

    def after(self, step: int, data: bytes) -> "Mark":
        """Returns the mark of the file with `data` added, a row of `step`."""
        return Mark(step, self.size + len(data), zlib.crc32(data, self.crc))


EMPTY = Mark()


def from_json(value: Any) -> list[Mark]:
    """Returns the marks in a checkpoint's record; raises ValueError unless they are marks of a file that only grows."""
    if not isinstance(value, list) or not all(_is_mark(entry) for entry in value):
        raise ValueError("is not a list of [step, size, checksum]")
    marks = [Mark(*entry) for entry in value]
    if any(a.size > b.size for a, b in itertools.pairwise(marks)):
        raise ValueError("has sizes that decrease")
    return marks


def _is_mark(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 3 and all(map(is_count, entry))


def with_mark(marks: Sequence[Mark], mark: Mark) -> list[Mark]:
    """Returns the marks with a new last one, thinned if there are many."""
    more = [*(m for m in marks if m.size < mark.size), mark]
    return more if len(more) <= _MOST else more[::-2][::-1]


def last_good(path: str, marks: Sequence[Mark]) -> Mark:
    """Returns the last mark up to which the file's bytes are those marked; EMPTY if there is no such mark, or no file."""
    good = EMPTY
    if os.path.exists(path):
        length = os.path.getsize(path)
        with open(path, "rb") as file:
            for mark in marks:
                if (
                    mark.size > length
                    or good.after(mark.step, file.read(mark.size - good.size)) != mark
                ):
                    break
                good = mark
    return good


def cut(path: str, size: int) -> None:
    """Shortens a file to its first bytes, atomically; without a file it creates an empty one."""
    data = b""
    if os.path.exists(path):
        with open(path, "rb") as file:
            data = file.read(size)
    files.write(path, data, synced=True)  # the rows are nowhere else


def copy_aside(path: str) -> str:
    """Copies a damaged file to a name that is free, `<path>.damaged` or that with a number; returns it."""
    names = (f"{path}.damaged{number or ''}" for number in itertools.count())
    aside = next(name for name in names if not os.path.exists(name))
    # Synced, since the rows are taken out of the original next.
    with open(path, "rb") as damaged, files.replacing(aside, synced=True) as copy:
        shutil.copyfileobj(damaged, copy)
    return aside
