"""Training sequences in Megatron's files: what was written is read, and files that are wrong are refused by name."""

import struct

import numpy as np
import pytest

from espalier.data.rows.megatron import SequenceFile
from espalier.data.text.row_files import DataError
from tests.data.rows import sequence_files

TOKENS = 7


def some(count, dtype=np.uint16):
    return np.random.default_rng(0).integers(0, 300, (count, TOKENS)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_sequences_are_read_in_their_order(tmp_path, dtype):
    rows = some(5, dtype)
    name = sequence_files.write(tmp_path / "document", rows)
    for given in (name, f"{name}.bin", f"{name}.idx"):
        file = SequenceFile(given, tokens=TOKENS)
        assert file.count == 5
        np.testing.assert_array_equal(file.rows(1, 4), rows[1:4])


def test_a_digest_is_of_the_tokens_that_are_read(tmp_path):
    rows = some(5)
    first = SequenceFile(sequence_files.write(tmp_path / "one", rows), tokens=TOKENS)
    rows[4] = 1
    other = SequenceFile(sequence_files.write(tmp_path / "two", rows), tokens=TOKENS)
    assert first.digest(0, 4) == other.digest(0, 4) != first.digest(1, 4)
    assert first.digest(0, 5) != other.digest(0, 5)


def put(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def cut(path, by):
    path.write_bytes(path.read_bytes()[:-by])


SIZES, OFFSETS = 34, 34 + 4 * 5


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d, i: cut(d, 1), r"document.bin has 69 bytes, and its index 70, .*cut short"),
        (lambda d, i: d.write_bytes(d.read_bytes() * 2), "140 bytes, .* index is of another file"),
        (lambda d, i: d.unlink(), "document.bin: there is no such file"),
        (lambda d, i: i.unlink(), "document.idx: there is no such file"),
        (lambda d, i: i.write_bytes(b""), "document.idx does not begin with b'MMIDIDX"),
        (lambda d, i: put(i, 0, b"TNTIDX"), "does not begin with b'MMIDIDX"),
        (lambda d, i: cut(i, 8), r"document.idx has 134 bytes, and 142 by its own count of 5"),
        (lambda d, i: put(i, 9, struct.pack("<Q", 2)), "has version 2, and version 1"),
        (lambda d, i: put(i, 17, b"\x07"), "tokens of type 7, and tokens are integers"),
        (lambda d, i: put(i, 17, b"\x04"), "sequence 1 begins at byte 14, and 28 is expected"),
        (lambda d, i: put(i, 18, struct.pack("<Q", 1 << 61)), "of 2,305,843,009,213,693,952 seq"),
        (lambda d, i: put(i, SIZES + 8, struct.pack("<i", 9)), "sequence 2 has 9 tokens, and 7"),
        (lambda d, i: put(i, SIZES + 8, struct.pack("<i", -1)), "sequence 2 has -1 tokens"),
        (
            lambda d, i: put(i, OFFSETS + 24, struct.pack("<q", -14)),
            "sequence 3 begins at byte -14",
        ),
    ],
)
def test_files_that_are_wrong_are_refused_by_name(tmp_path, damage, words):
    name = sequence_files.write(tmp_path / "document", some(5))
    damage(tmp_path / "document.bin", tmp_path / "document.idx")
    with pytest.raises(DataError, match=words):
        SequenceFile(name, tokens=TOKENS)


def test_an_index_of_another_length_or_file_is_refused(tmp_path):
    name = sequence_files.write(tmp_path / "document", some(5))
    with pytest.raises(DataError, match="sequence 0 has 7 tokens, and 2,049 are expected"):
        SequenceFile(name, tokens=2049)
    sequence_files.write(tmp_path / "other", some(6))
    (tmp_path / "other.idx").rename(tmp_path / "document.idx")
    with pytest.raises(DataError, match="index is of another file"):
        SequenceFile(name, tokens=TOKENS)


def test_negative_tokens_are_refused(tmp_path):
    rows = some(5, np.int32)
    rows[3, 2] = -1
    file = SequenceFile(sequence_files.write(tmp_path / "document", rows), tokens=TOKENS)
    file.rows(0, 3)
    with pytest.raises(DataError, match="sequences 2 to 3 have the token -1"):
        file.rows(2, 4)
