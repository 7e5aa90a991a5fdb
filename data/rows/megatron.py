"""Reads training sequences in the order in which a run read them, from Megatron's two files of an indexed data set.

GPT-NeoX and Megatron-LM store tokens in NAME.bin and where each sequence lies in NAME.idx. Pythia's data sets of this kind are the
Pile as its models saw it: one sequence of 2,049 tokens after the other, 1,024 for each step, documents joined with an end-of-text
token between them. All numbers of NAME.idx are little-endian:

    bytes    what
    9        MMIDIDX and two zeros
    8        version, 1
    1        type of tokens: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6 and 7 are floats)
    8, 8     number N of sequences; number D of boundaries of documents
    4 N      tokens of each sequence, int32
    8 N      offset of each sequence in NAME.bin in bytes, int64
    8 D      first sequence of each document, and N, int64

Both files are mapped, not read: they may be larger than the memory.
"""

import hashlib
import os
import struct

import numpy as np

from espalier.data.text.row_files import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHECKED = 1 << 20  # sequences at a time


class SequenceFile:
    """Sequences of equal length in a fixed order.

    Args:
      name: path of the two files without .bin and .idx; with either is the same.
      tokens: tokens of each sequence.

    Attributes:
      count: number of sequences.

    Raises:
      DataError: a file is missing, of another format, cut short, or does not belong to the other one; or sequences have another
        length.
    """

    def __init__(self, name: str, *, tokens: int):
        self.name = name.removesuffix(".bin").removesuffix(".idx")
        self.tokens = tokens
        data, index = f"{self.name}.bin", f"{self.name}.idx"
        for path in (data, index):
            if not os.path.isfile(path):
                raise DataError(
                    f"{path}: there is no such file: sequences are a pair of files, {os.path.basename(self.name)}.bin and .idx, on "
                    "this machine (join the parts of a .bin first)"
                )
        self._index = index
        kind, self.count = self._read_header()
        self._dtype = np.dtype(_TYPES[kind])
        self._check_sequences(os.path.getsize(data))
        self._tokens = np.memmap(data, self._dtype, "r").reshape(self.count, tokens)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns the sequences from `start` to before `stop`, int64 [n, tokens].

        Raises:
          DataError: a token is negative.
        """
        rows = np.array(self._tokens[start:stop], np.int64)
        if rows.size and (low := rows.min()) < 0:
            raise DataError(
                f"{self.name}.bin: sequences {start:,} to {stop - 1:,} have the token {low}, which is negative: it is not of the type "
                "that the index records, or damaged"
            )
        return rows

    def digest(self, start: int, stop: int) -> str:
        """Returns the SHA-256 of these sequences' bytes."""
        digest = hashlib.sha256(str((self._dtype.str, self.tokens, start, stop)).encode())
        for first in range(start, stop, _CHECKED >> 6):
            digest.update(self._tokens[first : min(stop, first + (_CHECKED >> 6))])
        return digest.hexdigest()

    def _read_header(self) -> tuple[int, int]:
        """Returns the code of the type and the number of sequences, once the size of the index was checked."""
        size = os.path.getsize(self._index)
        with open(self._index, "rb") as file:
            head = file.read(_HEADER.size)
        if not head.startswith(MAGIC) or len(head) < _HEADER.size:
            raise DataError(
                f"{self._index} does not begin with {MAGIC!r}: it is no index of Megatron's mapped data sets, or it is cut short"
            )
        _, version, kind, count, boundaries = _HEADER.unpack(head)
        if version != 1:
            raise DataError(f"{self._index} has version {version}, and version 1 is read")
        if kind not in _TYPES:
            raise DataError(
                f"{self._index} has tokens of type {kind}, and tokens are integers, of types {', '.join(map(str, _TYPES))}"
            )
        wanted = _HEADER.size + 12 * count + 8 * boundaries
        if size != wanted:
            raise DataError(
                f"{self._index} has {size:,} bytes, and {wanted:,} by its own count of {count:,} sequences and {boundaries:,} "
                "boundaries of documents: it is cut short, damaged, or has modes of several media"
            )
        if not count:
            raise DataError(f"{self._index} has no sequence")
        return kind, count

    def _check_sequences(self, size: int) -> None:
        """Raises DataError unless all sequences have the length, and lie one after the other in a file of `size` bytes."""
        width = self._dtype.itemsize * self.tokens
        lengths = np.memmap(self._index, "<i4", "r", _HEADER.size, (self.count,))
        offsets = np.memmap(self._index, "<i8", "r", _HEADER.size + 4 * self.count, (self.count,))
        for start in range(0, self.count, _CHECKED):
            stop = min(start + _CHECKED, self.count)
            other = np.flatnonzero(lengths[start:stop] != self.tokens)
            if other.size:
                first = start + int(other[0])
                raise DataError(
                    f"{self._index}: sequence {first:,} has {lengths[first]:,} tokens, and {self.tokens:,} are expected: give the length "
                    "of the training sequences, or the files that are shuffled and cut into sequences (documents of their own lengths "
                    "are not yet in the order of training)"
                )
            moved = np.flatnonzero(offsets[start:stop] != np.arange(start, stop) * width)
            if moved.size:
                first = start + int(moved[0])
                raise DataError(
                    f"{self._index}: sequence {first:,} begins at byte {offsets[first]:,}, and {first * width:,} is expected, after the "
                    "one before it: the index is damaged, or of another order than the file's"
                )
        if size != self.count * width:
            raise DataError(
                f"{self.name}.bin has {size:,} bytes, and its index {self.count * width:,}, of {self.count:,} sequences of "
                f"{self.tokens:,} tokens: the .bin is cut short, or the index is of another file"
            )
