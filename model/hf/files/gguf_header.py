"""Checks the counts and lengths of a GGUF file, before the library `gguf` loops and allocates by them.

A GGUF file begins with a magic number, its version, the numbers of tensors and of key-value pairs; then the pairs,
then name, shape, type and offset of each tensor.
"""

import math
import os
import struct
from typing import BinaryIO

import gguf

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
_MIN_PAIR = 8 + 4 + 1  # bytes of the shortest pair: the length of its key, its type, its value
_MIN_TENSOR = 8 + 4 + 4 + 8
_MAX_ITEMS = 1 << 22  # of all arrays together; the library needs about 1 KB for each
_MAX_COUNT = 1 << 20  # pairs, and tensors
_MAX_DIMENSIONS = 4  # as GGML has


def check(path: str | os.PathLike) -> None:
    """Raises ValueError if a count or length does not fit the file, or is larger than any model needs."""
    with open(path, "rb") as file:
        cursor = _Cursor(file)
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if cursor.number("I") & 0xFFFF == 0:
            cursor.order = ">"
        tensors, pairs = cursor.number("Q"), cursor.number("Q")
        if max(tensors, pairs) > _MAX_COUNT:
            raise ValueError(f"it has {tensors} tensors and {pairs} entries")
        cursor.need(pairs * _MIN_PAIR + tensors * _MIN_TENSOR)
        for _ in range(pairs):
            cursor.skip(cursor.number("Q"))
            cursor.skip_value(cursor.number("I"))
        for _ in range(tensors):
            cursor.skip(cursor.number("Q"))
            _check_tensor(cursor)


def _check_tensor(cursor: "_Cursor") -> None:
    count = cursor.number("I")
    if count > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {count} dimensions")
    shape = [cursor.number("Q") for _ in range(count)]
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(cursor.number("I"))]
    cursor.number("Q")
    if math.prod(shape) // block * size > cursor.size:
        raise ValueError(f"a tensor of shape {shape} is larger than the file")


class _Cursor:
    """A place in a file; reading past its end raises ValueError."""

    def __init__(self, file: BinaryIO):
        self.size = os.fstat(file.fileno()).st_size
        self.order = "<"
        self._file = file
        self._left = self.size
        self._items = 0

    def need(self, count: int) -> None:
        if count > self._left:
            raise ValueError(f"{count} bytes are to follow, but only {self._left} do")

    def take(self, count: int) -> bytes:
        self.need(count)
        self._left -= count
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self.need(count)
        self._left -= count
        self._file.seek(count, os.SEEK_CUR)

    def number(self, code: str) -> int:
        content = self.take(struct.calcsize("=" + code))
        return struct.unpack(self.order + code, content)[0]

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            self._skip_array(self.number("I"), self.number("Q"))
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"an entry has the unknown type {kind}")

    def _skip_array(self, kind: int, count: int) -> None:
        self._items += count
        if self._items > _MAX_ITEMS:
            raise ValueError(f"its lists have {self._items} items")
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        elif kind in _SIZES:
            self.skip(count * _SIZES[kind])
        else:
            raise ValueError(f"a list has items of type {kind}")
